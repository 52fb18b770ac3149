"""Means of random samples with standard errors, and the random vectors behind them."""

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
    """The mean of independent samples, with its standard error.

    Attributes:
        value: the mean, [] or [n], in float64.
        standard_error: its standard error, shaped like value; nan if there is only one sample.
        samples: number of samples.
    """

    value: Tensor
    standard_error: Tensor
    samples: int

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """Return the mean of samples [p]."""
        count = len(samples)
        # Scaled by a power of two, which is exact, so that squares neither overflow nor vanish.
        exponent = int(samples.abs().amax().frexp().exponent) if samples.numel() else 0
        scaled = times_power(samples, -exponent)
        error = scaled.std() / math.sqrt(count) if count > 1 else torch.full((), torch.nan)
        mean, spread = scaled.mean(), error.double()
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
        half = _t_quantile((1 + confidence) / 2, self.samples - 1) * self.standard_error
        half = half.masked_fill(self.standard_error == 0, 0.0)
        return self.value - half, self.value + half


def signs(op: SymmetricOperator, count: int, random: torch.Generator) -> Tensor:
    """Return random vectors with elements 1 and -1, as rows [count, l]."""
    rows = torch.empty(count, VectorOps(op).length, dtype=op.dtype, device=op.device)
    return rows.random_(0, 2, generator=random).mul_(2).sub_(1)


def normals(op: SymmetricOperator, count: int, random: torch.Generator) -> Tensor:
    """Return standard normal vectors, as rows [count, l]."""
    rows = torch.empty(count, VectorOps(op).length, dtype=op.dtype, device=op.device)
    return rows.normal_(generator=random)


def check_real(op: SymmetricOperator) -> None:
    """Raise ValueError if the operator is not float32 or float64."""
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the operator must be float32 or float64, not {op.dtype}")


def check_finite(*results: Tensor) -> None:
    """Raise FloatingPointError if numbers that come from products are not finite."""
    if not all(bool(t.isfinite().all()) for t in results):
        raise FloatingPointError("a product H v is not finite: is the loss, at these parameters?")


def _t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t for a probability > 1/2, by bisection."""
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
    """Return P(T <= t) for t >= 0, a finite sum for whole degrees of freedom.

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
