"""Which pairs are wanted, how far off they are, and when that is enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eigenfilter.curvature.krylov_schur import Ritz

WHICH = ("LA", "SA", "LM", "BE")
CRITERIA = ("value", "vector")
_MISS = 0.1  # the probability, at most, that a look for copies misses one


@dataclass(frozen=True)
class Pairs:
    """Approximate eigenpairs without their vectors, on the host, in float64."""

    values: Tensor  # [m]
    residuals: Tensor  # [m]
    errors: Tensor  # [m], estimates of |theta - lambda|
    met: Tensor  # [m] bool, whether each has converged

    def __getitem__(self, picked: Tensor) -> Pairs:
        return Pairs(*(getattr(self, field.name)[picked] for field in fields(self)))

    def __add__(self, other: Pairs) -> Pairs:
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Pairs(*(torch.cat(pair) for pair in both))

    @staticmethod
    def none() -> Pairs:
        """Return no pairs."""
        empty = torch.empty(0, dtype=torch.float64)
        return Pairs(empty, empty, empty, empty.bool())


@dataclass(frozen=True)
class Rule:
    """What the caller of `eigsh` asked for, at a given norm and rounding of the operator."""

    which: str
    tol: float
    criterion: str
    norm: float  # ||H||, as far as it is known
    eps: float  # of the operator's dtype
    rounding: float  # a residual as small as rounding in the products makes it

    def best(self, values: Tensor, k: int, lead: Tensor | float = 0.0) -> Tensor:
        """Return the indices of the k best values, in the order of `EigenResult.values`.

        lead: [m], how much better than it is to count each value.
        """
        if self.which == "BE":
            low = (values - lead).argsort(stable=True)[: k // 2]
            rest = (values + lead).index_fill(0, low, -math.inf)
            high = rest.argsort(descending=True, stable=True)[: min(k, len(values)) - len(low)]
            return torch.cat([low, high.flip(0)])
        score = {"LA": values, "SA": -values, "LM": values.abs()}[self.which]
        return (score + lead).argsort(descending=True, stable=True)[:k]

    def allowed(self, values: Tensor) -> Tensor:
        """Return the errors allowed at `values`."""
        scale = values.abs().clamp_min(self.eps ** (2 / 3) * self.norm)
        return (self.tol * scale).clamp_min(self.rounding)

    def judge(self, ritz: Ritz, wanted: Tensor, closed: bool) -> Pairs:
        """Return the pairs with what is known of their errors.

        wanted: [m] bool, some of each end of the spectrum, or of one.
        closed: whether the pairs are of an invariant subspace: nothing improves them then.
        """
        theta, r = ritz.values, ritz.residuals
        rest = (~wanted).nonzero().flatten().tolist()
        first, last = (rest[0], rest[-1]) if rest else (0, -1)
        errors = r.clone()
        if rest:
            errors[:first] = _errors(-theta[: first + 1].flip(0), r[: first + 1].flip(0)).flip(0)
            errors[last + 1 :] = _errors(theta[last:], r[last:])
        if closed:
            return Pairs(theta, r, errors, torch.ones_like(wanted))
        if self.criterion == "value":
            return Pairs(theta, r, errors, errors <= self.allowed(theta))
        # Of those not wanted only the next ones matter: the intervals of others may be wide.
        apart = (theta[:, None] - theta).abs() - r
        same = (apart <= r[:, None]) & wanted
        other = ~wanted
        other[[first, last]] = False
        apart[same | other] = math.inf
        nearest = apart.amin(1)
        met = (r <= self.rounding) | ((r <= self.tol * nearest) & nearest.isfinite())
        return Pairs(theta, r, errors, met)

    def exhausted(self, found: Tensor, rest: Pairs, n: int, steps: int) -> bool:
        """Whether a sequence shows that nothing better than the values `found` is left to it.

        Had its operator, of order n, an eigenvalue lambda at or beyond the worst one found, the
        best of its values, theta, would after j steps from a random start be so far behind only
        with a probability of at most

            1.648 sqrt(n) exp(-sqrt(eps) (2 j - 1)),    eps = (lambda - theta) / spread.

        Source: J. Kuczynski and H. Wozniakowski, Estimating the largest eigenvalue by the power
        and Lanczos algorithms with a random start, SIAM J. Matrix Anal. Appl. 13 (1992), thm. 4.2.
        """
        lowest, highest = 0, len(rest.values) - 1
        for sign, worst in zip((-1.0, 1.0), self._worst(found), strict=True):
            if worst is None:
                continue
            top, bottom = (highest, lowest) if sign > 0 else (lowest, highest)
            behind = sign * (worst - float(rest.values[top]))
            spread = sign * (worst - float(rest.values[bottom])) + float(rest.residuals[bottom])
            relative = max(behind, 0.0) / spread if spread > 0 else 0.0
            chance = 1.648 * math.sqrt(n) * math.exp(-math.sqrt(relative) * (2 * steps - 1))
            if chance > _MISS and not rest.met[top]:
                return False
        return True

    def _worst(self, found: Tensor) -> tuple[float | None, float | None]:
        """Return what a value must pass to be wanted, at the low end and at the high end."""
        if self.which == "LA":
            return None, float(found.min())
        if self.which == "SA":
            return float(found.max()), None
        if self.which == "LM":
            size = float(found.abs().min())
            return -size, size
        low = len(found) // 2
        return float(found[low - 1]) if low else None, float(found[low])


def _errors(theta: Tensor, r: Tensor) -> Tensor:
    """Estimate the errors of Ritz values [k + 1], ascending, but for the first; r: residuals.

        min(r_i, min over j < i of 2 R_j^2 / (gap_ij - R_j)),    R_j^2 = sum over l > j of r_l^2,
        gap_ij = theta_i - theta_j - 3 r_j

    The pairs after j span a space whose residual is R_j and whose values lie gap_ij and more from
    the rest of the spectrum, if that ends at theta_j + 3 r_j. It usually ends at theta_j + r_j; the
    factors 2 and 3 are for where pair j has only begun to emerge. They cost 3% more products.
    """
    size = r[1:].square().flip(0).cumsum(0).flip(0).sqrt()  # R_j
    gap = (theta[1:, None] - theta[:-1] - 3.0 * r[:-1]).tril()
    bounds = torch.where(gap > 2.0 * size, 2.0 * size.square() / (gap - size), math.inf)
    return torch.cat([r[1:, None], bounds], dim=1).amin(1)
