"""The arithmetic of the references, rounded as in every other backend.

Coefficients are formed in float64 and rounded once to the arithmetic's dtype (float32; float64
where a parameter or its gradient is float64), and no multiply-add is fused: that way all backends
agree bit for bit. A reference is never optimized.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eigenfilter.kernels.conventions import Scalar

X, M, V = range(3)  # the outputs of a step, each rounded by its own random bits
_WORD = 0xFFFFFFFF


def real(value: Scalar, like: Tensor) -> Tensor:
    """A hyperparameter in float64, on the device of `like`."""
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).reshape(())


def inverse(grad_scale: Tensor | None, like: Tensor) -> Tensor:
    """S = 1 / grad_scale in float64; 1 without a scale."""
    return 1 / real(1.0 if grad_scale is None else grad_scale, like)


def power(base: Tensor, exponent: Scalar) -> Tensor:
    """base^exponent for a whole exponent, by squaring: with the same roundings in every backend."""
    result, n = torch.ones_like(base), int(exponent)
    while n > 0:
        if n % 2 == 1:
            result = result * base
        base, n = base * base, n // 2
    return result


def square_root(t: Tensor) -> Tensor:
    """The correctly rounded square root: torch's on a GPU, NumPy's on the CPU."""
    if t.device.type != "cpu":
        return t.sqrt()
    with np.errstate(invalid="ignore"):  # negative values give NaN, as in torch
        return torch.as_tensor(np.sqrt(t.numpy()))


def write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """target <- value, rounded to nearest; unchanged where found_inf is not zero."""
    rounded = value.to(target.dtype)
    if found_inf is not None:
        rounded = torch.where(found_inf.reshape(()) != 0, target, rounded)
    target.copy_(rounded)


def dithered(value: Tensor, like: Tensor, seed: Scalar | None, tensor: int, output: int) -> Tensor:
    """`value`; with a seed, as one of its two neighbors in the dtype of `like`, if narrow.

    Args:
        value: results of a step.
        like: the tensor that they are written to.
        seed: seed of the call, or None to leave the rounding to `write`.
        tensor: index of the tensor in the lists.
        output: X, M or V.
    """
    if seed is None or like.itemsize != 2:
        return value
    index = torch.arange(like.numel(), device=like.device).as_strided(like.shape, like.stride())
    key = _mix(_mix(real(seed, like).long(), tensor), output)
    return dither(value, like.dtype, _mix(index ^ key, key))


def _mix(word: Tensor, key: Tensor | int) -> Tensor:
    """The finalizer of MurmurHash3 on 32 bits in an int64, a key added between its rounds."""
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD
    word = ((word ^ word >> 13) + key) * 0xC2B2AE35 & _WORD
    return word ^ word >> 16


def dither(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round a float32 value, as random bits say, to one of its two neighbors in `dtype`.

    The neighbor farther from zero has the probability (distance from the other one) / spacing.
    Values that `dtype` holds stay. Values beyond its largest number, infinities and NaN are left to
    rounding to nearest.
    """
    cut = 0xFFFF if dtype == torch.bfloat16 else 0x1FFF
    bits = value.view(torch.int32)
    rounded = ((bits + (random & cut).int()) & ~cut).view(torch.float32)
    if dtype == torch.float16:
        # Below 2^-14 the spacing is 2^-24: 2^21 units of 2^-45, of which there are whole numbers.
        is_small = value.abs() < 2.0**-14
        units = (value.abs() * 2.0**45).where(is_small, 0.0).long()
        small = ((units + (random & 0x1FFFFF)) >> 21).float() * 2.0**-24
        rounded = small.copysign(value).where(is_small, rounded)
    return rounded.where(value.abs() < torch.finfo(dtype).max, value)
