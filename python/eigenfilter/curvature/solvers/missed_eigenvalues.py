"""A bound on the probability that a search for eigenvalues missed one."""

from __future__ import annotations

import math

import numpy as np

from eigenfilter.curvature.solvers.basis import Floats
from eigenfilter.curvature.solvers.krylov_schur import Ritz

Levels = tuple[float | None, float | None]
"""Beyond which level an eigenvalue counts as missed, at the low end and at the high end."""


class MissProbability:
    """How small a part of an unseen eigenvector a random start must have had.

    Let u be a unit eigenvector of lambda, orthogonal to the locked vectors. From H Q = Q T + P B,

        Q^T u = (lambda - T)^-1 B^T P^T u,    ||P^T u|| <= 1

    So along the b random columns C that a sequence started with, which are columns of Q, u has only

        C^T u = M(lambda) z,    M(lambda) = S_C (lambda - Theta)^-1 (B S)^T,    ||z|| <= 1      (1)

    where T S = S Theta and S_C are the rows of S that belong to C. At a restart P takes the place
    of C, and z that of C^T u, so the M of all stretches between restarts are multiplied. |det M|
    falls as lambda moves away from the spectrum of T. Hence the bound at the worst wanted value,
    moved outwards by the error allowed, holds for all eigenvalues beyond it. The density of C^T u
    for random orthonormal C is at most (n / 2 pi)^(b/2), hence

        P[one was missed] <= (n / 2)^(b/2) |det M| / Gamma(b / 2 + 1)                           (2)

    For b = 1 this is sqrt(2 n / pi) |M|. The bounds of both ends, and of successive sequences, add
    up.

    The bound is over random starts, for any spectrum, in exact arithmetic and for exact locked
    pairs. With rounding it holds for a matrix within some eps ||H|| of H. Where P is empty, because
    Q is invariant up to rounding, B is taken to be as large as that rounding.

    Source: (1), for b = 1 without restarts: J. van Dorsselaer, M. Hochstenbach, H. van der Vorst,
    Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos
    method, SIAM J. Matrix Anal. Appl. 22 (2000). The rest is ours.
    """

    def __init__(self, n: int, levels: Levels, sequences: int) -> None:
        """Begin the bound of a sequence.

        Args:
            n: the order of the operator.
            levels: see `Levels`.
            sequences: how many sequences have searched for missed pairs, including this one.
        """
        self._n = n
        self._levels = levels
        self._sequences = sequences
        self._logs = [0.0, 0.0]  # log |det M| of the stretches before, at each end

    def record_restart(self, ritz: Ritz, starting_columns: slice, rounding: float) -> None:
        """Account for a stretch that ends with a restart; arguments as in `probability`."""
        self._logs = [
            before + self._log(ritz, starting_columns, rounding, end)
            for end, before in enumerate(self._logs)
        ]

    def probability(self, ritz: Ritz, starting_columns: slice, rounding: float) -> float:
        """Return (2), at most 1.

        Args:
            ritz: the pairs of T.
            starting_columns: the columns of Q that the stretch started with.
            rounding: see `KrylovSchur.rounding`.
        """
        b = starting_columns.stop - starting_columns.start
        constant = 0.5 * b * math.log(0.5 * self._n) - math.lgamma(0.5 * b + 1.0)
        logs = [
            constant + before + self._log(ritz, starting_columns, rounding, end)
            for end, before in enumerate(self._logs)
            if self._levels[end] is not None
        ]
        total = sum(math.exp(min(log, 0.0)) for log in logs)
        return min(1.0, self._sequences * total)

    def _log(self, ritz: Ritz, starting_columns: slice, rounding: float, end: int) -> float:
        """Return log |det M| at the level of an end; inf where T has a value beyond it."""
        level = self._levels[end]
        if level is None:
            return 0.0
        distances = (level - ritz.values) * (-1.0 if end == 0 else 1.0)
        too_few = not len(distances) or starting_columns.stop > len(distances)
        if too_few or not distances.min() > 0:
            return math.inf
        # Relative to the nearest, which may be as small as rounding of an operator that is zero.
        near = float(distances.min())
        with np.errstate(over="ignore", divide="ignore"):
            left: Floats = ritz.vectors[starting_columns] / (distances / near)
            coupling = ritz.coupling / near
            if not np.isfinite(coupling).all():
                return math.inf
            size = float(np.linalg.norm(left, 2))
            singular = np.full(len(left), rounding / near * size)
            if len(coupling):
                values = np.linalg.svd(left @ coupling.T, compute_uv=False)
                least = np.finfo(np.float64).eps * size * float(np.linalg.norm(coupling))
                singular[: len(values)] = np.maximum(values, least)[: len(singular)]
            return float(np.log(singular).sum())
