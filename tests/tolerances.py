"""The one table of what a result may differ by from exact arithmetic, and why.

Where rooms must round alike, tests compare bits and need no tolerance.
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
    """Allowed: store |exact| + compute (sum of the terms' sizes) + subnormal.

    `store` is the rounding of the result to its dtype, `compute` that of the arithmetic before it:
    12 roundings on the longest path of an update, counting its coefficients'. `subnormal` is half
    the spacing of the smallest numbers.
    """

    store: float
    compute: float
    subnormal: float


KERNELS = {
    torch.float64: Tolerance(store=0.0, compute=12 * 2.0**-53, subnormal=2.0**-1074),
    torch.float32: Tolerance(store=0.0, compute=12 * 2.0**-24, subnormal=2.0**-150),
    torch.bfloat16: Tolerance(store=2.0**-8, compute=12 * 2.0**-24, subnormal=2.0**-134),
    torch.float16: Tolerance(store=2.0**-11, compute=12 * 2.0**-24, subnormal=2.0**-25),
}

# Relative. Squares are summed in float64; the result of narrower tensors is float32.
NORM = {
    torch.float64: 1e-14,
    torch.float32: 1.001 * 2.0**-24,
    torch.bfloat16: 1.001 * 2.0**-24,
    torch.float16: 1.001 * 2.0**-24,
}

# Relative, of a run of some hundred steps with momentum on a contracting problem against the same
# run in float64: the storage rounding times what the filter 1 / (1 - momentum) makes of it.
RUNS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 5e-3}


def exact(t: Tensor) -> Exact:
    """The elements in a wider format than the arithmetic under test."""
    wide = np.longdouble if t.dtype == torch.float64 else np.float64
    return t.detach().double().cpu().numpy().astype(wide)


def assert_near(actual: Tensor, expected: Exact, terms: Exact) -> None:
    """Fail unless `actual` is what its dtype's tolerance allows.

    Args:
        actual: the result.
        expected: its exact values.
        terms: sum of the sizes of the terms that `expected` is the sum of.
    """
    allowed = KERNELS[actual.dtype]
    bound = allowed.store * np.abs(expected) + allowed.compute * terms + allowed.subnormal
    error = np.abs(exact(actual) - expected)
    assert np.isfinite(error).all()
    assert (error <= bound).all(), f"{(error / bound).max()} times what is allowed"
