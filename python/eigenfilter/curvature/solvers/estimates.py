"""Means of random samples with their errors, and the random vectors they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.power_of_two_scale import times_power
from eigenfilter.curvature.solvers.vector_ops import VectorOps


@dataclass(frozen=True, eq=False)
class Estimate:
    """The mean of independent samples, with what they tell of its error.

    Attributes:
        value: [] or [n], float64.
        standard_error: like value; nan where there is but one sample.
        samples: their number.
    """

    value: Tensor
    standard_error: Tensor
    samples: int

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """Return the mean of samples [p]."""
        count = len(samples)
        # Relative to the largest, for squares to be numbers: by a power of two, which is exact.
        exponent = int(samples.abs().amax().frexp().exponent) if samples.numel() else 0
        near = times_power(samples, -exponent)
        error = near.std() / math.sqrt(count) if count > 1 else torch.full((), torch.nan)
        mean, spread = near.mean(), error.double()
        return cls(times_power(mean, exponent), times_power(spread, exponent), count)

    def __float__(self) -> float:
        return float(self.value)

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the two ends of a confidence interval, by Student's t distribution.

        Raises:
            ValueError: confidence is not in (0, 1).
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), not {confidence}")
        reach = _t_quantile((1 + confidence) / 2, self.samples - 1) * self.standard_error
        reach = reach.masked_fill(self.standard_error == 0, 0.0)
        return self.value - reach, self.value + reach


def signs(op: SymmetricOperator, count: int, random: torch.Generator) -> Tensor:
    """Random vectors of signs, as rows [count, l]."""
    rows = torch.empty(count, VectorOps(op).length, dtype=op.dtype, device=op.device)
    return rows.random_(0, 2, generator=random).mul_(2).sub_(1)


def normals(op: SymmetricOperator, count: int, random: torch.Generator) -> Tensor:
    """Standard normal vectors, as rows [count, l]."""
    rows = torch.empty(count, VectorOps(op).length, dtype=op.dtype, device=op.device)
    return rows.normal_(generator=random)


def check_real(op: SymmetricOperator) -> None:
    """Raise ValueError for an operator that is not float32 or float64."""
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the operator must be float32 or float64, not {op.dtype}")


def check_finite(*found: Tensor) -> None:
    """Raise FloatingPointError where what products gave is not finite, here as elsewhere."""
    if not all(bool(t.isfinite().all()) for t in found):
        raise FloatingPointError("a product H v is not finite: is the loss, at these parameters?")


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's t for p > 1/2, by bisection of its distribution."""
    if freedom < 1:
        return math.inf
    low, high = 0.0, 1.0
    while _t_distribution(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high) if _t_distribution(middle, freedom) < probability else (low, middle)
        )
    return high


def _t_distribution(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0: a finite sum for whole degrees of freedom.

    Source: M. Abramowitz and I. Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    c = math.cos(angle)
    odd = freedom % 2
    term, total = (c, 0.0) if odd else (1.0, 0.0)
    for j in range(odd, freedom - 1, 2):
        total += term
        term *= c * c * (j + 1) / (j + 2)
    inside = math.sin(angle) * total
    share = 2 / math.pi * (angle + inside) if odd else inside
    return 0.5 + 0.5 * share
