"""The verdict on each side of a filter, from what is known of the ends of a spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eigenfilter.curvature import SpectrumBounds
from eigenfilter.filters import PolynomialFilter

INSIDE, AT_THE_EDGE, OUTSIDE, UNDECIDED = "inside", "at the edge", "outside", "undecided"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Tolerances:
    """How near an end of the filter counts, and how small error bars get.

    Attributes:
        edge: relative to the edge, in [0, 1).
        saddle: relative to the largest eigenvalue in magnitude, >= 0.
        error: of the error bars, relative to the same, > 0.

    Raises:
        ValueError: one is out of its range.
    """

    edge: float
    saddle: float
    error: float

    def __post_init__(self) -> None:
        if not 0 <= self.edge < 1:
            raise ValueError(f"edge_tol must be in [0, 1), not {self.edge}")
        if not 0 <= self.saddle < math.inf:
            raise ValueError(f"saddle_tol must be at least 0, not {self.saddle}")
        if not self.error > 0:
            raise ValueError(f"tol must be positive, not {self.error}")

    def sharp(self, found: SpectrumBounds) -> bool:
        """Whether the error bars of both ends are as small as asked for."""
        return max(found.top.margin, found.bottom.margin) <= self.error * found.scale


@dataclass(frozen=True)
class Side:
    """One end of a spectrum beside one end of a filter.

    Attributes:
        verdict: "inside", "at the edge" (the upper side only), "outside" or "undecided".
        limit: the end of the filter.
        tolerance: how far from it counts as at it, absolutely.
        low, high: between them the extreme eigenvalue lies; the outer one but for the failure
            probability.
        needed: which evidence would decide, where it is undecided.
    """

    verdict: str
    limit: float
    tolerance: float
    low: float
    high: float
    needed: str = ""


def upper_side(found: SpectrumBounds, edge: float, tolerances: Tolerances) -> Side:
    """The largest eigenvalue beside the edge."""
    theta = found.top.value
    slack = tolerances.edge * abs(edge) if math.isfinite(edge) else 0.0
    low, high = theta - found.rounding, theta + found.top.margin
    if theta - found.top.residual > edge + slack:
        verdict = OUTSIDE
    elif low >= edge - slack and high <= edge + slack:
        verdict = AT_THE_EDGE
    elif high <= edge:
        verdict = INSIDE
    else:
        end = edge if theta < edge - slack else edge + slack
        return Side(UNDECIDED, edge, slack, low, high, _products(found, abs(end - theta)))
    return Side(verdict, edge, slack, low, high)


def saddle_side(
    found: SpectrumBounds, intervals: Sequence[Interval], tolerances: Tolerances
) -> Side:
    """The smallest eigenvalues beside the lower end of the uppermost interval, usually 0.

    intervals: all, ascending; below the uppermost eigenvalues are admitted too.
    """
    *below, (limit, _) = intervals
    slack = tolerances.saddle * found.scale
    theta = found.bottom.value
    low, high = theta - found.bottom.margin, theta + found.rounding
    outside = found.values + found.residuals < limit - slack
    for left, right in below:
        outside &= (found.values - found.residuals > right) | (
            found.values + found.residuals < left
        )
    if bool(outside.any()):
        verdict = OUTSIDE
    elif low >= limit - slack:
        verdict = INSIDE
    elif _past(found, limit - slack):
        needed = "where the eigenvalues between the admitted intervals are: their ends do not tell"
        return Side(UNDECIDED, limit, slack, low, high, needed)
    else:
        needed = _products(found, abs(theta - (limit - slack)))
        return Side(UNDECIDED, limit, slack, low, high, needed)
    return Side(verdict, limit, slack, low, high)


def in_second_interval(side: Side, found: SpectrumBounds) -> bool:
    """Whether an eigenvalue lies below the uppermost interval, perhaps in another one."""
    return side.verdict == UNDECIDED and _past(found, side.limit - side.tolerance)


def saddle_by_image(
    side: Side, flt: PolynomialFilter, image: SpectrumBounds, tolerances: Tolerances
) -> Side:
    """The saddle side by both ends of p(H) = H + rho H^2, which show what is between intervals.

    p is negative between the intervals alone. So all eigenvalues are admitted where those of p(H)
    reach from p(limit - tolerance), at the vertex -1 / (2 rho) at most, to p of the edge.
    """
    rho = flt.coefficients[2]
    edge = flt.max_eigenvalue()
    least = float(flt.p(max(side.limit - side.tolerance, -0.5 / rho)))
    most = float(flt.p(edge + tolerances.edge * abs(edge)))
    top, bottom = image.top, image.bottom
    verdict, needed = UNDECIDED, ""
    if bottom.value + bottom.residual < least or top.value - top.residual > most:
        verdict = OUTSIDE
    elif bottom.value - bottom.margin >= least and top.value + top.margin <= most:
        verdict = INSIDE
    else:
        needed = _products(image, min(abs(bottom.value - least), abs(most - top.value)))
    return Side(verdict, side.limit, side.tolerance, side.low, side.high, needed)


def _past(found: SpectrumBounds, level: float) -> bool:
    values: Tensor = found.values + found.residuals
    return bool(values[0] < level)


def _products(found: SpectrumBounds, distance: float) -> str:
    most = found.products_for(distance)
    if most is None:
        return f"an error bar below {distance:.2g}, which rounding forbids: use float64"
    if most <= found.matvecs:
        return "a few more products, until the residual is smaller: raise max_matvecs"
    return (
        f"an error bar below {distance:.2g}, if the eigenvalue is where it seems: "
        f"max_matvecs={most} at most, whatever the spectrum, after {found.matvecs}"
    )
