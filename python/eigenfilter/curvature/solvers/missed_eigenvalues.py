"""With which probability an eigenvalue was missed."""

from __future__ import annotations

import math

import numpy as np

from eigenfilter.curvature.solvers.basis import Floats
from eigenfilter.curvature.solvers.krylov_schur import Ritz

Levels = tuple[float | None, float | None]
"""What an eigenvalue must lie beyond to be missed: at the low end and at the high end."""


class MissProbability:
    """How little of an eigenvector beyond the present pairs a random start may have held.

    Let u be a unit eigenvector of lambda, orthogonal to what is locked. From H Q = Q T + P B,

        Q^T u = (lambda - T)^-1 B^T P^T u,    ||P^T u|| <= 1

    So of the b random columns C that a sequence began with, which are columns of Q, u holds only

        C^T u = M(lambda) z,    M(lambda) = S_C (lambda - Theta)^-1 (B S)^T,    ||z|| <= 1      (1)

    for T S = S Theta and the rows S_C of C. At a restart P takes the place of C, z that of C^T u,
    and the M of each stretch are multiplied. |det M| falls as lambda moves away from the spectrum
    of T, so that the bound at the worst wanted value, and the error allowed beyond it, holds for
    all eigenvalues further out. The density of C^T u, of random orthonormal C, is at most
    (n / 2 pi)^(b/2), hence

        P[one was missed] <= (n / 2)^(b/2) |det M| / Gamma(b / 2 + 1)                           (2)

    for b = 1: sqrt(2 n / pi) |M|. Both ends add up, and so do sequences, one after another.

    That is a bound over random starts, whatever the spectrum, in exact arithmetic, for pairs locked
    that are exact. With rounding it is that of a matrix within some eps ||H|| of H. Where nothing
    waits any more, because Q is invariant up to rounding, B is taken to be as large as that.

    Source: (1), for b = 1 without restarts: J. van Dorsselaer, M. Hochstenbach, H. van der Vorst,
    Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos
    method, SIAM J. Matrix Anal. Appl. 22 (2000). The rest is ours.
    """

    def __init__(self, n: int, levels: Levels, sequences: int) -> None:
        """Of an operator of order n; sequences: how many looked for better pairs, with this."""
        self._n = n
        self._levels = levels
        self._sequences = sequences
        self._logs = [0.0, 0.0]  # log |det M| of the stretches before, at each end

    def restarted(self, ritz: Ritz, began: slice, rounding: float) -> None:
        """Note what a stretch saw that ends with a restart. Arguments as of `probability`."""
        self._logs = [
            before + self._log(ritz, began, rounding, end) for end, before in enumerate(self._logs)
        ]

    def probability(self, ritz: Ritz, began: slice, rounding: float) -> float:
        """Return (2), at most 1.

        Args:
            ritz: the pairs of T.
            began: which columns of Q the stretch began with.
            rounding: see `KrylovSchur.rounding`.
        """
        b = began.stop - began.start
        constant = 0.5 * b * math.log(0.5 * self._n) - math.lgamma(0.5 * b + 1.0)
        logs = [
            constant + before + self._log(ritz, began, rounding, end)
            for end, before in enumerate(self._logs)
            if self._levels[end] is not None
        ]
        found = sum(math.exp(min(log, 0.0)) for log in logs)
        return min(1.0, self._sequences * found)

    def _log(self, ritz: Ritz, began: slice, rounding: float, end: int) -> float:
        """Return log |det M| at the level of an end; inf where T reaches beyond it."""
        level = self._levels[end]
        if level is None:
            return 0.0
        distances = (level - ritz.values) * (-1.0 if end == 0 else 1.0)
        if not len(distances) or began.stop > len(distances) or not distances.min() > 0:
            return math.inf
        # Relative to the nearest, which may be as small as rounding of an operator that is zero.
        near = float(distances.min())
        with np.errstate(over="ignore", divide="ignore"):
            reached: Floats = ritz.vectors[began] / (distances / near)
            coupling = ritz.coupling / near
            if not np.isfinite(coupling).all():
                return math.inf
            size = float(np.linalg.norm(reached, 2))
            singular = np.full(len(reached), rounding / near * size)
            if len(coupling):
                found = np.linalg.svd(reached @ coupling.T, compute_uv=False)
                least = np.finfo(np.float64).eps * size * float(np.linalg.norm(coupling))
                singular[: len(found)] = np.maximum(found, least)[: len(singular)]
            return float(np.log(singular).sum())
