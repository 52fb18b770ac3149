"""Lanczos' three-term recurrence from many starts at once."""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfilter import kernels
from eigenfilter.curvature.solvers.vector_ops import VectorOps

_LEAST = 1e-12  # of a square relative to those it is the difference of


class BatchedLanczos:
    """The recurrences of H from starts q_0 [p, l], each for itself, a step of all at a time.

        beta_{j+1} q_{j+1} = H q_j - alpha_j q_j - beta_j q_{j-1}

    A step goes over the vectors twice: once to read two for alpha, once to combine three. Nothing
    is read again to be normalised. The vectors kept are the q_j but for factors near one: what
    beta_{j+1} would be in exact arithmetic, which is known from the first pass, divides the
    combination, and the length that this has goes into the next step's factors. What q_{j+1} has
    along q_j by rounding is known as well, and alpha_{j+1} takes it into account: it is
    q . (H q - beta q_before), the better of the two ways to compute it, without a pass of its own.

    A recurrence ends where beta is zero: its vectors and coefficients are zero from then on.

    Attributes:
        q: [p, l], the present vectors, contiguous; what H is to be multiplied with.

    Source: C. C. Paige, Computational variants of the Lanczos method for the eigenproblem, J. Inst.
    Math. Appl. 10 (1972).
    """

    def __init__(self, ops: VectorOps, starts: Tensor, known: Tensor) -> None:
        """Begin from starts [p, l], all but of length 1, contiguous; they are overwritten.

        known: orthonormal rows [k, l] that all vectors are kept orthogonal to.
        """
        self.q = starts
        self._ops, self._known = ops, known
        self._before = torch.zeros_like(starts)
        self._inverse = _reciprocal(ops.total(kernels.row_dots(starts, starts)[1]).sqrt())
        self._inverse_before = torch.zeros_like(self._inverse)  # 1 / their lengths [p]
        self._beta = torch.zeros_like(self._inverse)
        self._overlap = torch.zeros_like(self._inverse)  # q_j . q_{j-1}

    def step(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Go on, by the products w = H q [p, l]; return alpha_j and beta_{j+1} [p], float64."""
        q, u, scale = self.q, self._before, self._inverse
        dots, squares = self._ops.total(kernels.row_dots(q, w)) * scale**2
        alpha = dots - self._beta * self._overlap
        left = squares - alpha**2 - self._beta**2
        expected = torch.maximum(left, _LEAST * squares).sqrt()
        factors = torch.stack([scale, -alpha * scale, -self._beta * self._inverse_before])
        sums = kernels.three_term(u, q, w, factors * _reciprocal(expected))
        squares, dots = self._ops.total(sums)
        length = squares.sqrt()
        if len(self._known):
            length = self._ops.project_out(u, self._known, passes=1)[1]
        self.q, self._before = u, q
        self._inverse, self._inverse_before = _reciprocal(length), scale
        self._overlap = dots * scale * self._inverse
        self._beta = expected * length
        return alpha, self._beta


def _reciprocal(t: Tensor) -> Tensor:
    """1 / t, and 0 of 0."""
    return torch.where(t == 0, 0.0, 1 / t)
