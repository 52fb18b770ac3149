"""The Lanczos three-term recurrence from many starts at once."""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfilter import kernels
from eigenfilter.curvature.solvers.vector_ops import VectorOps

_LEAST = 1e-12  # smallest beta^2, relative to the squares that it is the difference of


class BatchedLanczos:
    """The recurrences of H from starts q_0 [p, l], independent of each other, in common steps.

        beta_{j+1} q_{j+1} = H q_j - alpha_j q_j - beta_j q_{j-1}

    A recurrence ends where beta is zero: its vectors and coefficients are zero from then on. No
    vectors are kept, so that orthogonality is lost as eigenvalues converge.

    This differs from the textbook in:

    1. A step makes two passes over the vectors, not three: it reads two vectors for alpha, then
       combines three. No pass normalizes. The combination is divided by the beta_{j+1} that exact
       arithmetic predicts from the first pass, beta^2 = ||H q||^2 - alpha^2 - beta_j^2, so that the
       stored vector has a length near 1; its true length goes into the next step's factors.
    2. alpha_{j+1} is q . (H q - beta q_before), the more accurate one of the two formulas (Paige),
       without a pass of its own: the second pass also returns the overlap of q_{j+1} with q_j,
       which rounding leaves, and alpha is corrected by beta times it.

    Attributes:
        q: [p, l], the present vectors, contiguous, which H multiplies next.

    Source: C. C. Paige, Computational variants of the Lanczos method for the eigenproblem, J. Inst.
    Math. Appl. 10 (1972).
    """

    def __init__(self, ops: VectorOps, starts: Tensor, deflation: Tensor) -> None:
        """Begin the recurrences.

        Args:
            ops: the vector arithmetic.
            starts: [p, l], contiguous, of length 1 up to rounding. They are overwritten.
            deflation: orthonormal rows [k, l] that all vectors are kept orthogonal to.
        """
        self.q = starts
        self._ops, self._deflation = ops, deflation
        self._before = torch.zeros_like(starts)
        self._inverse = _reciprocal(ops.total(kernels.row_dots(starts, starts)[1]).sqrt())
        self._inverse_before = torch.zeros_like(self._inverse)  # 1 / the length of _before [p]
        self._beta = torch.zeros_like(self._inverse)
        self._overlap = torch.zeros_like(self._inverse)  # q_j . q_{j-1}

    def step(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step with the products w = H q [p, l]; return alpha_j and beta_{j+1} [p], float64.

        w is not changed.
        """
        q, u, scale = self.q, self._before, self._inverse
        dots, squares = self._ops.total(kernels.row_dots(q, w)) * scale**2
        alpha = dots - self._beta * self._overlap
        remainder = squares - alpha**2 - self._beta**2
        expected = torch.maximum(remainder, _LEAST * squares).sqrt()
        factors = torch.stack([scale, -alpha * scale, -self._beta * self._inverse_before])
        sums = kernels.lanczos_step(u, q, w, factors * _reciprocal(expected))
        squares, dots = self._ops.total(sums)
        length = squares.sqrt()
        if len(self._deflation):
            length = self._ops.orthogonalize(u, self._deflation, passes=1)[1]
        self.q, self._before = u, q
        self._inverse, self._inverse_before = _reciprocal(length), scale
        self._overlap = dots * scale * self._inverse
        self._beta = expected * length
        return alpha, self._beta


def _reciprocal(t: Tensor) -> Tensor:
    """Return 1 / t, and 0 for 0."""
    return torch.where(t == 0, 0.0, 1 / t)
