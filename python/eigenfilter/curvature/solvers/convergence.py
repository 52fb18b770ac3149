"""Which pairs are wanted, how far off they are, and when that is enough.

This differs from ARPACK, and from the textbook, in:

1. The error of a value is estimated quadratically. ARPACK accepts theta_i if its residual r_i is at
   most tol |theta_i|. But an eigenvalue that has a gap to the rest of the spectrum is within
   r_i^2 / gap of theta_i, so "value" usually needs half as many correct digits of the vector, and
   fewer products.
2. The gap is that of a group. The textbook's r_i^2 / gap_i takes the distance to the nearest Ritz
   value, which is useless in a cluster. Here theta_i may belong to any group of wanted pairs at the
   end of the spectrum: the whole group has a small residual R and a gap to what follows it. All
   groups are tried and the best bound counts; see `_errors`.
3. The other end of a gap is not assumed to be converged either: it is the next Ritz value less 3
   times its residual.
4. The floor of the tolerance is relative to ||H||. ARPACK uses eps^(2/3), an absolute number, so
   that multiplying H by a constant changes the result.
5. A pair whose residual is what rounding leaves of it counts as converged, however small tol is.
6. "vector" bounds the angle between vector and eigenvector by r_i / gap_i; ARPACK has no such rule.
7. Convergence of k pairs is not the end. One Krylov sequence sees one vector of each eigenspace, so
   a second one checks that nothing was missed. `steps_to_exhaust` says when it may stop: a bound
   from the literature over random starts, which needs no knowledge of the spectrum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from eigenfilter.curvature.solvers.basis import Floats
from eigenfilter.curvature.solvers.krylov_schur import Ritz
from eigenfilter.curvature.solvers.missed_eigenvalues import Levels

Indices: TypeAlias = NDArray[np.intp]
Flags: TypeAlias = NDArray[np.bool_]

WHICH = ("LA", "SA", "LM", "BE")
CRITERIA = ("value", "vector")
_MISS = 0.1  # the largest probability that a check for repeated eigenvalues misses one


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs, without their vectors."""

    values: Floats  # [m]
    residuals: Floats  # [m]
    errors: Floats  # [m], estimates of |theta - lambda|
    excess: Floats  # [m], the error in multiples of the error allowed; 0 where it is allowed

    @property
    def converged(self) -> Flags:
        """Whether each has converged [m]."""
        converged: Flags = self.excess == 0.0
        return converged

    def __getitem__(self, indices: Indices | slice) -> RitzPairs:
        return RitzPairs(*(getattr(self, field.name)[indices] for field in fields(self)))

    def __add__(self, other: RitzPairs) -> RitzPairs:
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return RitzPairs(*(np.concatenate(pair) for pair in both))

    @staticmethod
    def none() -> RitzPairs:
        """Return no pairs."""
        empty = np.empty(0)
        return RitzPairs(empty, empty, empty, empty)


@dataclass(frozen=True)
class ConvergenceRule:
    """What the caller of `eigsh` asked for, at a given norm and rounding of the operator."""

    which: str
    tol: float
    criterion: str
    norm: float  # ||H||, as far as it is known
    eps: float  # of the operator's dtype
    rounding: float  # the residual that rounding in the products alone may cause

    def best(self, values: Floats, k: int, advantage: Floats | float = 0.0) -> Indices:
        """Return the indices of the k best values, in the order of `EigenResult.values`.

        advantage: [m], by how much each value counts as better than it is.
        """
        if self.which == "BE":
            low = np.argsort(values - advantage, kind="stable")[: k // 2]
            rest = values + advantage
            rest[low] = -math.inf
            high = np.argsort(-rest, kind="stable")[: min(k, len(values)) - len(low)]
            return np.concatenate([low, high[::-1]])
        score = {"LA": values, "SA": -values, "LM": np.abs(values)}[self.which]
        return np.argsort(-(score + advantage), kind="stable")[:k]

    def allowed_errors(self, values: Floats) -> Floats:
        """Return the errors allowed at `values`."""
        scale = np.maximum(np.abs(values), self.eps ** (2 / 3) * self.norm)
        allowed: Floats = np.maximum(self.tol * scale, self.rounding)
        return allowed

    def assess(self, ritz: Ritz, wanted: Flags, closed: bool) -> RitzPairs:
        """Return the pairs with their errors.

        Args:
            ritz: the pairs, ascending.
            wanted: [m], which of them are wanted. These lie at the ends of the spectrum:

                index     0 .. first - 1     first .. last     last + 1 .. m - 1
                          wanted, low end    not wanted        wanted, high end

            closed: whether the pairs belong to an invariant subspace, so that nothing improves
                them.
        """
        theta, r = ritz.values, ritz.residuals
        rest = np.flatnonzero(~wanted)
        first, last = (rest[0], rest[-1]) if len(rest) else (0, -1)
        errors = r.copy()
        if len(rest):
            # `_errors` takes the nearest pair that is not wanted, then the wanted ones outwards.
            errors[:first] = _errors(-theta[first::-1], r[first::-1])[::-1]
            errors[last + 1 :] = _errors(theta[last:], r[last:])
        if closed:
            return RitzPairs(theta, r, errors, np.zeros_like(theta))
        if self.criterion == "value":
            return RitzPairs(theta, r, errors, _excess(errors, self.allowed_errors(theta)))
        # Of the pairs that are not wanted only the next ones matter: intervals of others may be
        # wide.
        apart = np.abs(theta[:, None] - theta) - r
        same = (apart <= r[:, None]) & wanted
        other = ~wanted
        other[[first, last]] = False
        apart[same | other] = math.inf
        nearest = apart.min(1)
        nearest = np.where(np.isfinite(nearest), np.maximum(nearest, 0.0), 0.0)
        excess = _excess(r, self.tol * nearest)
        return RitzPairs(theta, r, errors, np.where(r <= self.rounding, 0.0, excess))

    def with_rounding(self, pairs: RitzPairs, rounding: Floats) -> RitzPairs:
        """Return pairs with the effect of the rounding of their vectors.

        The iteration does not see this effect, and no step would reduce it. A value errs by its
        square over ||H||, and has not converged where that alone is more than allowed.

        rounding: [m], an upper bound of ||(H - theta) d|| for the errors d of the vectors.
        """
        if not rounding.any():
            return pairs
        second_order = rounding**2 / self.norm
        residuals = pairs.residuals + rounding
        errors = np.minimum(pairs.errors + second_order, residuals)
        good = second_order <= self.allowed_errors(pairs.values)
        return RitzPairs(pairs.values, residuals, errors, np.where(good, pairs.excess, math.inf))

    def steps_to_exhaust(self, values: Floats, rest: RitzPairs, n: int) -> float:
        """Return how many steps show that a sequence has nothing better than the k `values`.

        Let an eigenvalue lambda of the sequence's operator, of order n, lie at or beyond the worst
        of the k values. After j steps from a random start, the best Ritz value theta of the
        sequence is as far behind as it is with a probability of at most

            1.648 sqrt(n) exp(-sqrt(eps) (2 j - 1)),    eps = (lambda - theta) / spread.

        The number of steps grows as theta comes closer. None are needed if theta has converged.

        Args:
            values: the k values.
            rest: the pairs of the sequence, ascending.
            n: the order of the operator.

        Source: J. Kuczynski and H. Wozniakowski, Estimating the largest eigenvalue by the power
        and Lanczos algorithms with a random start, SIAM J. Matrix Anal. Appl. 13 (1992), thm. 4.2.
        """
        lowest, highest = 0, len(rest.values) - 1
        steps = 0.0
        for sign, worst in zip((-1.0, 1.0), self._worst(values), strict=True):
            top, bottom = (highest, lowest) if sign > 0 else (lowest, highest)
            if worst is None or rest.converged[top]:
                continue
            behind = max(sign * (worst - float(rest.values[top])), 0.0)
            spread = sign * (worst - float(rest.values[bottom])) + float(rest.residuals[bottom])
            root = math.sqrt(behind / spread) if spread > 0 else 0.0
            exponent = math.log(1.648 * math.sqrt(n) / _MISS)
            steps = max(steps, (exponent / root + 1.0) / 2.0 if root > 0 else math.inf)
        return steps

    def levels(self, values: Floats) -> Levels:
        """Return beyond which level, at each end, an eigenvalue is missing among the k `values`.

        It is the worst of them, further out by the error allowed.
        """
        low, high = self._worst(values)
        return (
            None if low is None else low - float(self.allowed_errors(np.array(low))),
            None if high is None else high + float(self.allowed_errors(np.array(high))),
        )

    def _worst(self, values: Floats) -> tuple[float | None, float | None]:
        """Return what a value must pass to be wanted, at the low end and at the high end."""
        if self.which == "LA":
            return None, float(values.min())
        if self.which == "SA":
            return float(values.max()), None
        if self.which == "LM":
            size = float(np.abs(values).min())
            return -size, size
        low = len(values) // 2
        return float(values[low - 1]) if low else None, float(values[low])


def _excess(errors: Floats, allowed: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(errors > allowed, errors / allowed, 0.0)


def _errors(theta: Floats, r: Floats) -> Floats:
    """Estimate the errors of all Ritz values [k + 1], ascending, except the first.

        min(r_i, min over j < i of 2 R_j^2 / (gap_ij - R_j)),    R_j^2 = sum over l > j of r_l^2,
        gap_ij = theta_i - theta_j - 3 r_j

    The pairs after j span a space whose residual is R_j:

        theta_0   ..   theta_j  |-- 3 r_j --|  gap_ij  |  theta_i        theta_k
        not wanted     the rest of H ends here             `---- the group, residual R_j

    Its values lie gap_ij and more from the rest of the spectrum, if that ends at theta_j + 3 r_j.
    It usually ends at theta_j + r_j; the factors 2 and 3 are for where pair j has only begun to
    emerge, and cost 3% more products.

    r: the residuals [k + 1].
    """
    size = np.sqrt(np.cumsum(r[:0:-1] ** 2)[::-1])  # R_j
    gap = np.tril(theta[1:, None] - theta[:-1] - 3.0 * r[:-1])
    far = gap > 2.0 * size
    bounds = np.where(far, 2.0 * size**2 / np.where(far, gap - size, 1.0), math.inf)
    errors: Floats = np.minimum(r[1:], bounds.min(1, initial=math.inf))
    return errors
