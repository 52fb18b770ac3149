"""Means of random samples with their errors, and the random vectors they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator


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
        error = samples.std() / math.sqrt(count) if count > 1 else torch.full((), torch.nan)
        return cls(samples.mean(), error.double(), count)

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
        return self.value - reach, self.value + reach


def generator(op: SymmetricOperator, seed: int) -> torch.Generator:
    """A generator of the operator's device."""
    return torch.Generator(op.device).manual_seed(seed)


def draw_signs(op: SymmetricOperator, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Random signs as numbers of the operator's dtype."""
    bits = torch.randint(0, 2, shape, generator=random, device=op.device)
    return (2 * bits - 1).to(op.dtype)


def signs(op: SymmetricOperator, count: int, seed: int) -> Tensor:
    """Random vectors of signs, as rows [count, n]."""
    return draw_signs(op, (count, op.shape[0]), generator(op, seed))


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's t, by Cornish and Fisher's expansion: to 1% from 3 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    if freedom < 1:
        return math.inf
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
