"""Filters of linear recursions in the gradient, such as heavy ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import ArrayLike, NDArray

from eigenfilter.filters.stability import Filter, Interval, check_field, inside, merge


@dataclass(frozen=True, eq=False)
class Linear(Filter):
    """The recursion z+ = D z - lr B g(z), which is the same for every parameter.

    The state z = (z_1, ..., z_s) holds s vectors like the parameters. D [s, s] mixes them, g is
    the gradient of f at z_1, and B [s] distributes it over the vectors. Along an eigenvector of the
    Hessian with eigenvalue lambda a step is the block

        D - lr lambda B e_1^T

    and convergence from almost every start implies that its spectral radius is at most 1. For s = 1
    the admitted set is (D - 1) / lr <= lambda <= (D + 1) / lr.

    Args:
        D: matrix of the recursion, a number or [s, s].
        lr: learning rate, greater than 0.
        B: weights of the gradient, [s]. The default is (1, 0, ..., 0): only z_1 takes it.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or lr is not positive.

    Source: x+ = D x - alpha g(x) is the general form of arXiv 2510.09034. That D and B are the same
    for every parameter is our reading.

    >>> decayed = Linear(0.98, lr=0.1)  # gradient descent with decoupled weight decay
    >>> [(round(low, 9), round(high, 9)) for low, high in decayed.intervals()]
    [(-0.2, 19.8)]
    >>> beta = 0.5
    >>> heavy_ball = Linear([[1 + beta, -beta], [1, 0]], lr=0.1)
    >>> [(round(low, 9) + 0.0, round(high, 9)) for low, high in heavy_ball.intervals()]
    [(0.0, 30.0)]
    """

    D: ArrayLike
    lr: float
    B: ArrayLike | None = None

    def __post_init__(self) -> None:
        D = np.atleast_2d(np.array(self.D, np.float64))
        if D.size == 0:
            raise ValueError("D must be a number or [s, s] with s >= 1")
        first = np.zeros(len(D))
        first[0] = 1.0
        B = first if self.B is None else np.atleast_1d(np.array(self.B, np.float64))
        if D.ndim != 2 or D.shape[0] != D.shape[1] or B.shape != (len(D),):
            raise ValueError(f"D must be a number or [s, s], and B [s]: got {D.shape}, {B.shape}")
        if not (np.isfinite(D).all() and np.isfinite(B).all()):
            raise ValueError("the entries of D and B must be finite")
        check_field(self, "lr", 0.0, math.inf)
        if self.lr == 0.0:
            raise ValueError("lr must be positive: with 0 there is nothing to filter")
        object.__setattr__(self, "D", D)
        object.__setattr__(self, "B", B)

    def intervals(self) -> list[Interval]:
        """The admitted eigenvalues: disjoint closed intervals, ascending; perhaps none.

        With chi_D the characteristic polynomial of D and m(z) that of e_1^T adj(z I - D) B, an
        eigenvalue z of the block solves chi_D(z) + lr lambda m(z) = 0. At an edge |z| = 1, where
        lambda is real only if chi_D(z) m(1/z) = chi_D(1/z) m(z): the roots of a polynomial. Between
        two edges the spectral radius decides.
        """
        chi, m = self._polynomials()
        cuts = []
        for z in _unit_roots(chi, m):
            # Where both vanish, the edge is a limit: that of their first derivatives that do not.
            for order in range(len(chi)):
                denominator = complex(polynomial.polyval(z, polynomial.polyder(m, order)))
                if abs(denominator) > 1e-9:
                    value = complex(polynomial.polyval(z, polynomial.polyder(chi, order)))
                    cuts.append((-value / denominator).real / self.lr)
        cuts = sorted(set(cuts))
        admitted = [
            (low, high)
            for low, high in pairwise((-math.inf, *cuts, math.inf))
            if low < high and self._radius(inside(low, high)) <= 1.0 + 1e-9
        ]
        return merge(admitted)

    def spectral_radius(self, lam: ArrayLike) -> NDArray[np.float64]:
        """See `Filter.spectral_radius`.

        Raises:
            ValueError: `lam` is not finite.
        """
        values = np.asarray(lam, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("spectral_radius needs finite eigenvalues")
        block = np.broadcast_to(np.asarray(self.D), (*values.shape, *np.shape(self.D))).copy()
        block[..., :, 0] -= self.lr * values[..., None] * np.asarray(self.B)
        return np.asarray(np.abs(np.linalg.eigvals(block)).max(axis=-1), np.float64)

    def _radius(self, lam: float) -> float:
        return float(self.spectral_radius(lam))

    def _polynomials(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """chi_D and m, lowest power first: det(z I - D + t B e_1^T) = chi_D(z) + t m(z)."""
        D, B = np.asarray(self.D), np.asarray(self.B)
        shifted = D.copy()
        shifted[:, 0] -= B
        chi = np.atleast_1d(np.poly(D)).real[::-1]
        return chi, np.atleast_1d(np.poly(shifted)).real[::-1] - chi


def _unit_roots(chi: NDArray[np.float64], m: NDArray[np.float64]) -> list[complex]:
    """All z with |z| = 1 where chi(z) / m(z) may be real, 1 and -1 among them."""
    m = np.concatenate([m, np.zeros(len(chi) - len(m))])
    crossed = polynomial.polysub(polynomial.polymul(chi, m[::-1]), polynomial.polymul(chi[::-1], m))
    scale = np.abs(crossed).max(initial=0.0)
    candidates: list[complex] = [1.0, -1.0]
    trimmed = np.trim_zeros(np.where(np.abs(crossed) > 1e-14 * scale, crossed, 0.0))
    for poly in (trimmed, chi):
        if len(poly) > 1:
            roots = polynomial.polyroots(poly)
            candidates += [complex(z / abs(z)) for z in roots if abs(abs(z) - 1.0) < 1e-6]
    return candidates
