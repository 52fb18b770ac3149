"""Conventions of all backends: types of arguments, dtypes and scales of arithmetic."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Scalar = float | Tensor

Table = tuple[bytes, bytes, bytes]
"""What a check of arguments has read, for the backends that are written in Python.

These are data pointers, int64 [present lists, n], and element counts, int64 [n]; last the numbers
of the gradients' dtypes, uint8 [n], or nothing where all are the lists'.
"""


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtypes` are computed with."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@functools.cache
def gradient_dtype(param: torch.dtype, grad: torch.dtype) -> torch.dtype:
    """Return the dtype in which a gradient of dtype `grad` is read, exactly, for a parameter.

    It is the parameter's dtype or, if that does not hold all numbers of `grad`, the next wider one:
    float32 for bfloat16 and float16, float64 for float32.

    Raises:
        TypeError: no dtype that the kernels read holds them.
    """
    for dtype in (param, torch.float32 if param.itemsize == 2 else torch.float64):
        if grad.is_floating_point and _contains(torch.finfo(dtype), torch.finfo(grad)):
            return dtype
    raise TypeError(
        f"a gradient is {grad} and its parameter {param}: the kernels read gradients of {param} "
        f"parameters in {param} and {dtype}; set the parameter's grad_dtype to one of them"
    )


def _contains(wide: torch.finfo, narrow: torch.finfo) -> bool:
    """Whether a dtype has all numbers of another."""
    return (
        wide.max >= narrow.max
        and wide.eps <= narrow.eps
        and wide.tiny * wide.eps <= narrow.tiny * narrow.eps
    )


def power_of_two(largest: Tensor) -> Tensor:
    """A power of two, like `largest` >= 0: divided by it, no square overflows or vanishes."""
    limits = torch.finfo(torch.float64)
    clamped = largest.clamp(limits.tiny, limits.max)
    return clamped / (2 * torch.frexp(clamped).mantissa)
