"""Which pairs are wanted, how far off they are, and when that is enough."""

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
_MISS = 0.1  # the probability, at most, that a look for copies misses one


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs without their vectors."""

    values: Floats  # [m]
    residuals: Floats  # [m]
    errors: Floats  # [m], estimates of |theta - lambda|
    excess: Floats  # [m], how many times the error allowed each may err, or 0 if no more than once

    @property
    def met(self) -> Flags:
        """Whether each has converged [m]."""
        met: Flags = self.excess == 0.0
        return met

    def __getitem__(self, picked: Indices | slice) -> RitzPairs:
        return RitzPairs(*(getattr(self, field.name)[picked] for field in fields(self)))

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
    rounding: float  # a residual as small as rounding in the products makes it

    def best(self, values: Floats, k: int, lead: Floats | float = 0.0) -> Indices:
        """Return the indices of the k best values, in the order of `EigenResult.values`.

        lead: [m], how much better than it is to count each value.
        """
        if self.which == "BE":
            low = np.argsort(values - lead, kind="stable")[: k // 2]
            rest = values + lead
            rest[low] = -math.inf
            high = np.argsort(-rest, kind="stable")[: min(k, len(values)) - len(low)]
            return np.concatenate([low, high[::-1]])
        score = {"LA": values, "SA": -values, "LM": np.abs(values)}[self.which]
        return np.argsort(-(score + lead), kind="stable")[:k]

    def allowed(self, values: Floats) -> Floats:
        """Return the errors allowed at `values`."""
        scale = np.maximum(np.abs(values), self.eps ** (2 / 3) * self.norm)
        allowed: Floats = np.maximum(self.tol * scale, self.rounding)
        return allowed

    def judge(self, ritz: Ritz, wanted: Flags, closed: bool) -> RitzPairs:
        """Return the pairs with what is known of their errors.

        wanted: [m], some of each end of the spectrum, or of one.
        closed: whether the pairs are of an invariant subspace: nothing improves them then.
        """
        theta, r = ritz.values, ritz.residuals
        rest = np.flatnonzero(~wanted)
        first, last = (rest[0], rest[-1]) if len(rest) else (0, -1)
        errors = r.copy()
        if len(rest):
            errors[:first] = _errors(-theta[first::-1], r[first::-1])[::-1]
            errors[last + 1 :] = _errors(theta[last:], r[last:])
        if closed:
            return RitzPairs(theta, r, errors, np.zeros_like(theta))
        if self.criterion == "value":
            return RitzPairs(theta, r, errors, _excess(errors, self.allowed(theta)))
        # Of those not wanted only the next ones matter: the intervals of others may be wide.
        apart = np.abs(theta[:, None] - theta) - r
        same = (apart <= r[:, None]) & wanted
        other = ~wanted
        other[[first, last]] = False
        apart[same | other] = math.inf
        nearest = apart.min(1)
        nearest = np.where(np.isfinite(nearest), np.maximum(nearest, 0.0), 0.0)
        excess = _excess(r, self.tol * nearest)
        return RitzPairs(theta, r, errors, np.where(r <= self.rounding, 0.0, excess))

    def with_rounding(self, pairs: RitzPairs, rounded: Floats) -> RitzPairs:
        """Return pairs with what the rounding of their vectors did to them.

        rounded: [m], ||(H - theta) d||, or more, of the errors d of the vectors. The iteration does
            not see it, and nothing that it could do would change it. A value errs by its square,
            over ||H||, and has not converged where that alone is more than allowed.
        """
        if not rounded.any():
            return pairs
        second = rounded**2 / self.norm
        residuals = pairs.residuals + rounded
        errors = np.minimum(pairs.errors + second, residuals)
        good = second <= self.allowed(pairs.values)
        return RitzPairs(pairs.values, residuals, errors, np.where(good, pairs.excess, math.inf))

    def steps_to_exhaust(self, found: Floats, rest: RitzPairs, n: int) -> float:
        """Return how many steps show that nothing better than the values `found` is left.

        Had the operator of a sequence, of order n, an eigenvalue lambda at or beyond the worst one
        found, the best of its values, theta, would after j steps from a random start be so far
        behind only with a probability of at most

            1.648 sqrt(n) exp(-sqrt(eps) (2 j - 1)),    eps = (lambda - theta) / spread.

        No step is needed where theta has converged. The number only grows as theta comes closer.

        Source: J. Kuczynski and H. Wozniakowski, Estimating the largest eigenvalue by the power
        and Lanczos algorithms with a random start, SIAM J. Matrix Anal. Appl. 13 (1992), thm. 4.2.
        """
        lowest, highest = 0, len(rest.values) - 1
        steps = 0.0
        for sign, worst in zip((-1.0, 1.0), self._worst(found), strict=True):
            top, bottom = (highest, lowest) if sign > 0 else (lowest, highest)
            if worst is None or rest.met[top]:
                continue
            behind = max(sign * (worst - float(rest.values[top])), 0.0)
            spread = sign * (worst - float(rest.values[bottom])) + float(rest.residuals[bottom])
            root = math.sqrt(behind / spread) if spread > 0 else 0.0
            exponent = math.log(1.648 * math.sqrt(n) / _MISS)
            steps = max(steps, (exponent / root + 1.0) / 2.0 if root > 0 else math.inf)
        return steps

    def levels(self, found: Floats) -> Levels:
        """Return what an eigenvalue must lie beyond for the values `found` to lack it: the worst of
        them, by the error allowed."""
        low, high = self._worst(found)
        return (
            None if low is None else low - float(self.allowed(np.array(low))),
            None if high is None else high + float(self.allowed(np.array(high))),
        )

    def _worst(self, found: Floats) -> tuple[float | None, float | None]:
        """Return what a value must pass to be wanted, at the low end and at the high end."""
        if self.which == "LA":
            return None, float(found.min())
        if self.which == "SA":
            return float(found.max()), None
        if self.which == "LM":
            size = float(np.abs(found).min())
            return -size, size
        low = len(found) // 2
        return float(found[low - 1]) if low else None, float(found[low])


def _excess(errors: Floats, allowed: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(errors > allowed, errors / allowed, 0.0)


def _errors(theta: Floats, r: Floats) -> Floats:
    """Estimate the errors of Ritz values [k + 1], ascending, but for the first; r: residuals.

        min(r_i, min over j < i of 2 R_j^2 / (gap_ij - R_j)),    R_j^2 = sum over l > j of r_l^2,
        gap_ij = theta_i - theta_j - 3 r_j

    The pairs after j span a space whose residual is R_j and whose values lie gap_ij and more from
    the rest of the spectrum, if that ends at theta_j + 3 r_j. It usually ends at theta_j + r_j; the
    factors 2 and 3 are for where pair j has only begun to emerge. They cost 3% more products.
    """
    size = np.sqrt(np.cumsum(r[:0:-1] ** 2)[::-1])  # R_j
    gap = np.tril(theta[1:, None] - theta[:-1] - 3.0 * r[:-1])
    far = gap > 2.0 * size
    bounds = np.where(far, 2.0 * size**2 / np.where(far, gap - size, 1.0), math.inf)
    errors: Floats = np.minimum(r[1:], bounds.min(1, initial=math.inf))
    return errors
