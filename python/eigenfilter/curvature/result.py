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
            An eigenvalue of H lies within residuals[i] of values[i]. Rounding in the products
            themselves, some units in the last place of ||H||, is not in it.
        converged: [k] bool, whether residuals[i] met the tolerance.
        matvecs: the number of products used.
        reason: why the iteration stopped; advice where it stopped early.

    Tensors are on the operator's device; values, vectors and residuals in its dtype.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    matvecs: int
    reason: str
