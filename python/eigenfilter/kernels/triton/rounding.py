"""Stochastic rounding for the Triton kernels, with the same bits as `arithmetic`.

`noise` determines the random bits of a program's chunk: a key, made from the seed and the index of
the tensor, and the index of the chunk's first element. None stands for rounding to nearest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# The outputs of a descent, each rounded by its own random bits.
X = tl.constexpr(0)
M = tl.constexpr(1)
V = tl.constexpr(2)


@triton.jit
def _mix(word, key):
    """The finalizer of MurmurHash3, a key added between its rounds."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = ((word ^ (word >> 13)) + key) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def noise_of(seed, tensor, first):
    """The noise of a chunk of a tensor that begins with its element `first`."""
    return _mix(seed.to(tl.int32).to(tl.uint32), tensor.to(tl.uint32)), first.to(tl.uint32)


@triton.jit
def dither(value, random, HALF: tl.constexpr):
    """A float32 value as one of its two neighbors in float16 (HALF) or bfloat16: `arithmetic`'s."""
    CUT: tl.constexpr = 0x1FFF if HALF else 0xFFFF
    LARGEST: tl.constexpr = 0x477FE000 if HALF else 0x7F7F0000
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    rounded = (bits + (random & CUT)) & (0xFFFFFFFF - CUT)
    if HALF:
        is_small = size < 0x38800000
        units = tl.where(is_small, size, 0).to(tl.float32, bitcast=True) * 2.0**45
        whole = units.to(tl.int32).to(tl.uint32) + (random & 0x1FFFFF)
        small = (whole >> 21).to(tl.int32).to(tl.float32) * 2.0**-24
        rounded = tl.where(is_small, small.to(tl.uint32, bitcast=True) | (bits ^ size), rounded)
    return tl.where(size < LARGEST, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def rounded(value, noise, OUTPUT: tl.constexpr, like, start, BLOCK: tl.constexpr):
    """`value`; with noise, as one of its two neighbors in the dtype of `like`, if narrow."""
    if noise is not None and like.dtype.primitive_bitwidth == 16:
        key, first = noise
        own = _mix(key, tl.full((), OUTPUT, tl.uint32))
        index = first + (start + tl.arange(0, BLOCK)).to(tl.uint32)
        value = dither(value, _mix(index ^ own, own), like.dtype == tl.float16)
    return value
