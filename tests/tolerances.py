"""The one table of how far a result may differ from exact arithmetic, and why.

Where backends must round alike, tests compare bits and need no tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Exact = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Tolerance:
    """Allowed: store |exact| + roundings unit (sum of the terms' sizes) + subnormal.

    `store` is the rounding of the result to its dtype, `unit` that of each operation before it,
    `subnormal` half the spacing of the smallest numbers.
    """

    store: float
    unit: float
    subnormal: float


KERNELS = {
    torch.float64: Tolerance(store=0.0, unit=2.0**-53, subnormal=2.0**-1074),
    torch.float32: Tolerance(store=0.0, unit=2.0**-24, subnormal=2.0**-150),
    torch.bfloat16: Tolerance(store=2.0**-8, unit=2.0**-24, subnormal=2.0**-134),
    torch.float16: Tolerance(store=2.0**-11, unit=2.0**-24, subnormal=2.0**-25),
}

# Roundings on the longest path of an update, counting its coefficients'. AdamW's moments are among
# them: m takes 5 (1 - beta1; d's scale and product; product; sum) and v 8 (d twice, its square,
# 1 - beta2, product, sum).
ROUNDINGS = 12


def adamw_roundings(
    dtype: torch.dtype, beta1: float, beta2: float, step: int, ahead: bool = False
) -> float:
    """Roundings on the longest path of AdamW's x; one more with an extrapolation, `ahead`.

    The denominator takes 9.5: half of v's 8, the root, a coefficient of 2.5 (half of 1 - beta2^n,
    the root, the inverse), product and sum. The quotient: 9.5 and m's 5, a coefficient of 2 (1 -
    beta1^n, and lr by it), product, quotient, and the difference from x: 19.5. In float32 the
    coefficients are one rounding each, formed in double before.

    Beside that, beta^n by squaring is n - 1 roundings off, and 1 - beta^n as often beta^n / (1 -
    beta^n) more; this in double always.
    """

    def power(beta: float) -> float:
        return (step - 1) * beta**step / (1 - beta**step)

    return 20 + ahead + (power(beta1) + power(beta2) / 2) * 2.0**-53 / KERNELS[dtype].unit


# Relative and a step: our AdamW and torch's. Each multiplies x by its decay and subtracts, 3
# roundings, and for steps below |x| / 13 the 20 of a step count for less than 2 on x: 10 for both,
# and 2 for where a step lessens |x|.
ADAMW_AGAINST_TORCH = {torch.float64: 12 * 2.0**-53, torch.float32: 12 * 2.0**-24}

# Relative. Squares are summed in float64; the result of narrower tensors is float32.
NORM = {
    torch.float64: 1e-14,
    torch.float32: 1.001 * 2.0**-24,
    torch.bfloat16: 1.001 * 2.0**-24,
    torch.float16: 1.001 * 2.0**-24,
}


def softmax_roundings(logits: Exact, p: Exact) -> Exact:
    """Roundings on the longest path of a product with the softmax p [n, c] of logits [n, c].

    Let x be the distance of a logit from the largest. The difference is one rounding, and an
    exponential by way of a power of two another one and a half of x, so that a probability is 2.5 x
    off; so is each term of their sum. Two exponentials of 4 each (correction and own), the
    quotient, factors and differences take 16.
    """
    x = logits.max(1, keepdims=True) - logits
    return 16 + 2.5 * (x + (p * x).sum(1, keepdims=True))


# Relative, of a run of some hundred steps with momentum on a contracting problem against the same
# run in float64: the storage rounding times what the filter 1 / (1 - momentum) makes of it.
RUNS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 5e-3}


def exact(t: Tensor) -> Exact:
    """The elements in a wider format than the arithmetic under test."""
    wide = np.longdouble if t.dtype == torch.float64 else np.float64
    return t.detach().double().cpu().numpy().astype(wide)


def assert_near(
    actual: Tensor, expected: Exact, terms: Exact, roundings: float = ROUNDINGS
) -> None:
    """Fail unless `actual` is what its dtype's tolerance allows.

    Args:
        actual: the result.
        expected: its exact values.
        terms: sum of the sizes of the terms that `expected` is the sum of.
        roundings: on the longest path of `actual`.
    """
    allowed = KERNELS[actual.dtype]
    compute = roundings * allowed.unit
    bound = allowed.store * np.abs(expected) + compute * terms + allowed.subnormal
    error = np.abs(exact(actual) - expected)
    assert np.isfinite(error).all()
    assert (error <= bound).all(), f"{(error / bound).max()} times what is allowed"
