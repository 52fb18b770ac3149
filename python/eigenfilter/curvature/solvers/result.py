"""What an eigenvalue solver returns: values with their evidence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class EigenResult:
    """k eigenpairs of a symmetric operator H [n, n], and how far they can be trusted.

    Attributes:
        values: [k], the eigenvalues theta. LA: descending; SA and BE: ascending; LM: descending in
            magnitude.
        vectors: [n, k], orthonormal; column i belongs to values[i].
        residuals: [k], ||H v - theta v||, known from the iteration without further products.
            An eigenvalue of H lies within residuals[i] of values[i]. Bounds where copies were
            found, since then pairs come of several sequences, or the basis is in half precision;
            else exact.
        errors: [k], estimates of |theta - lambda|, at most residuals: quadratic in the residual
            where the gap to the next pairs is seen. Rounding in the products, some units in the
            last place of ||H||, is in neither.
        converged: [k] bool, whether each pair met the tolerance; in half precision, apart from
            what the rounding of the basis adds to its error, and whether that met it as well.
        matvecs: the number of products used, all together.
        multiplicity_matvecs: those of them that looked for further copies of the pairs first found.
        miss_probability: the probability, at most, that an eigenvalue was missed which belongs
            among the k, so that a value is off by more than the tolerance: over the random starts
            of the looks for copies, whatever the spectrum, for exact pairs in exact arithmetic. 1
            where nothing is known: no look was made, it was cut short, or there are more copies of
            the worst value. 0 where the basis spans the whole space. See `missed_eigenvalues.MissProbability`.
        orthogonality: max |Q^T Q - I| of the last basis Q, measured.
        reason: why the iteration stopped; advice where it stopped early.

    Tensors are on the operator's device; values, vectors, residuals and errors in its dtype.
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
