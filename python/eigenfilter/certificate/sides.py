"""The verdict on each side of a filter, from bounds of both ends of a spectrum."""

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
    """The tolerances of a certificate.

    Attributes:
        edge: distance from the edge that counts as "at the edge", relative to the edge, in [0, 1).
        saddle: how negative an eigenvalue may be, relative to the largest magnitude, >= 0.
        error: how small error bars must get, relative to the largest magnitude, > 0.

    Raises:
        ValueError: a tolerance is out of its range.
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

    def sharp(self, bounds: SpectrumBounds) -> bool:
        """Whether the error bars of both ends are as small as `error` requires."""
        return max(bounds.top.margin, bounds.bottom.margin) <= self.error * bounds.scale


@dataclass(frozen=True)
class Side:
    """One end of a spectrum compared with one end of a filter.

    Attributes:
        verdict: "inside", "at the edge" (only for the upper side), "outside" or "undecided".
        limit: the end of the filter.
        tolerance: absolute distance from it that the verdict allows.
        low: lower bound of the extreme eigenvalue.
        high: upper bound of the extreme eigenvalue. The outer one of the two bounds may fail, with
            the failure probability.
        needed: evidence that would decide, if the verdict is "undecided".
    """

    verdict: str
    limit: float
    tolerance: float
    low: float
    high: float
    needed: str = ""


def upper_side(bounds: SpectrumBounds, edge: float, tolerances: Tolerances) -> Side:
    """Compare the largest eigenvalue with the edge."""
    theta = bounds.top.value
    slack = tolerances.edge * abs(edge) if math.isfinite(edge) else 0.0
    low, high = theta - bounds.rounding, theta + bounds.top.margin
    if theta - bounds.top.residual > edge + slack:
        verdict = OUTSIDE
    elif low >= edge - slack and high <= edge + slack:
        verdict = AT_THE_EDGE
    elif high <= edge:
        verdict = INSIDE
    else:
        end = edge if theta < edge - slack else edge + slack
        return Side(UNDECIDED, edge, slack, low, high, _products(bounds, abs(end - theta)))
    return Side(verdict, edge, slack, low, high)


def saddle_side(
    bounds: SpectrumBounds, intervals: Sequence[Interval], tolerances: Tolerances
) -> Side:
    """Compare the smallest eigenvalues with the lower end of the uppermost interval, usually 0.

    intervals: all intervals of the filter, ascending; the lower ones admit eigenvalues too.
    """
    *below, (limit, _) = intervals
    slack = tolerances.saddle * bounds.scale
    theta = bounds.bottom.value
    low, high = theta - bounds.bottom.margin, theta + bounds.rounding
    outside = bounds.values + bounds.residuals < limit - slack
    for left, right in below:
        outside &= (bounds.values - bounds.residuals > right) | (
            bounds.values + bounds.residuals < left
        )
    if bool(outside.any()):
        verdict = OUTSIDE
    elif low >= limit - slack:
        verdict = INSIDE
    elif _past(bounds, limit - slack):
        needed = "where the eigenvalues between the admitted intervals are: their ends do not tell"
        return Side(UNDECIDED, limit, slack, low, high, needed)
    else:
        needed = _products(bounds, abs(theta - (limit - slack)))
        return Side(UNDECIDED, limit, slack, low, high, needed)
    return Side(verdict, limit, slack, low, high)


def in_second_interval(side: Side, bounds: SpectrumBounds) -> bool:
    """Whether an eigenvalue lies below the uppermost interval, possibly in another one."""
    return side.verdict == UNDECIDED and _past(bounds, side.limit - side.tolerance)


def saddle_by_image(
    side: Side, flt: PolynomialFilter, image: SpectrumBounds, tolerances: Tolerances
) -> Side:
    """Decide the saddle side by both ends of p(H) = H + rho H^2.

    They show whether eigenvalues lie between the intervals, because p is negative only there. All
    eigenvalues are admitted if those of p(H) lie between p(limit - tolerance), with the argument at
    least the vertex -1 / (2 rho), and p of the edge.
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


def _past(bounds: SpectrumBounds, level: float) -> bool:
    values: Tensor = bounds.values + bounds.residuals
    return bool(values[0] < level)


def _products(bounds: SpectrumBounds, distance: float) -> str:
    most = bounds.products_for(distance)
    if most is None:
        return f"an error bar below {distance:.2g}, which rounding forbids: use float64"
    if most <= bounds.matvecs:
        return "a few more products, until the residual is smaller: raise max_matvecs"
    return (
        f"an error bar below {distance:.2g}, if the eigenvalue is where it seems: "
        f"max_matvecs={most} at most, whatever the spectrum, after {bounds.matvecs}"
    )
