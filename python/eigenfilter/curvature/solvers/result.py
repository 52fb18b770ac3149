"""What an eigenvalue solver returns: values with their evidence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class EigenResult:
    """k eigenpairs of a symmetric operator H [n, n], with measured errors.

    Attributes:
        values: [k], the eigenvalues theta. They are descending for LA, ascending for SA and BE, and
            descending in magnitude for LM.
        vectors: [n, k], orthonormal; column i belongs to values[i].
        residuals: [k], ||H v - theta v||, known from the iteration without further products. An
            eigenvalue of H lies within residuals[i] of values[i]. They are upper bounds where
            repeated eigenvalues were found, since then pairs come from several sequences, and for a
            half-precision basis; else they are exact.
        errors: [k], estimates of |theta - lambda|, at most residuals. They are quadratic in the
            residual where the gap to the next pairs is known. Neither contains the rounding of the
            products, some units in the last place of ||H||.
        converged: [k] bool, whether each pair met the tolerance. For a half-precision basis, also
            whether the error that its rounding adds met it.
        matvecs: number of products, in all.
        multiplicity_matvecs: number of those that searched for repeated eigenvalues.
        miss_probability: upper bound of the probability that an eigenvalue was missed which belongs
            among the k, so that a value is off by more than the tolerance. It is over the random
            starts of the checks, for any spectrum, for exact pairs in exact arithmetic. It is 1
            where nothing is known: if there was no check, if it was cut short, or if the worst
            value is repeated beyond the k; and 0 where the basis spans the whole space. See
            `missed_eigenvalues.MissProbability`.
        orthogonality: max |Q^T Q - I| of the last basis Q, measured.
        reason: why the iteration stopped, with advice where it stopped early.

    Tensors are on the operator's device; values, vectors, residuals and errors have its dtype.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    errors: Tensor
    converged: Tensor
    matvecs: int
    multiplicity_matvecs: int
    miss_probability: float
    orthogonality: float
    reason: str
