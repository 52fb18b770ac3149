"""Compressed tensors in the Triton kernels, with the bits of `kernels.compression`.

A block has whole groups of a state: their elements are a row of [BLOCK / GROUP, GROUP]. What is
absent, corrections or scales, has None for an address, and its branch is not compiled.

`how` to write results is whether the step is stopped, the noise of their rounding (see `rounding`),
and where the sequence that rounds codes and bfloat16 states stands at the chunk's first element, or
None.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from eigenfilter.kernels.triton.device import GROUP, divide, load, square_root, store, unless
from eigenfilter.kernels.triton.rounding import X, dither, rounded

_GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def read_corrections(at, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A block of corrections, or None, which Triton 3.6 returns only by a name."""
    corrections = None if at is None else load(at, start, length, BLOCK, WIDE)
    return corrections  # noqa: RET504


@triton.jit
def read_scales(at, start, length, BLOCK: tl.constexpr):
    """The scales of a block's groups, or None."""
    if at is None:
        scales = None
    else:
        at, mask = _groups(at, start, length, BLOCK)
        scales = tl.load(at, mask=mask, other=0)
    return scales


@triton.jit
def joined(params, corrections):
    """What parameters stand for: with corrections, master weights."""
    return params if corrections is None else _join(params, corrections)


@triton.jit
def decoded(state, scales, BLOCK: tl.constexpr):
    """What a state stands for: with scales it is codes."""
    return state if scales is None else _decode(state, scales, BLOCK)


@triton.jit
def write_params(x_at, c_at, p, c, x, how, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Write a block of parameters and of corrections, or the old ones."""
    stop, noise, _ = how
    if c_at is None:
        x = rounded(x, noise, X, p, start, BLOCK)
    else:
        x, rest = _split(x, p, c)
        store(c_at, unless(stop, c, rest), start, length, BLOCK, WIDE)
    store(x_at, unless(stop, p, x), start, length, BLOCK, WIDE)


@triton.jit
def write_state(
    at,
    scales_at,
    old,
    old_scales,
    value,
    how,
    start,
    length,
    OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write a block of a state, or the old one; return it as it is when it is read again."""
    stop, noise, turn = how
    if scales_at is None:
        if turn is not None and noise is None:
            value = dither(value, _words(turn, start, BLOCK), False)
        stored = rounded(value, noise, OUTPUT, old, start, BLOCK).to(old.dtype)
        value = stored
    else:
        stored, scales = _encode(value, old, turn, start, length, BLOCK, WIDE)
        value = _decode(stored, scales, BLOCK)
        scales_at, mask = _groups(scales_at, start, length, BLOCK)
        tl.store(scales_at, unless(stop, old_scales, scales), mask=mask)
    store(at, unless(stop, old, stored), start, length, BLOCK, WIDE)
    return value


@triton.jit
def _groups(at, start, length, BLOCK: tl.constexpr):
    """Where the scales of a block lie, and which of its groups begin before `length`."""
    lanes = tl.arange(0, BLOCK // GROUP)
    return at + start // GROUP + lanes, start + lanes * GROUP < length


@triton.jit
def turn_of(step, first):
    """Where the sequence of a step stands at element `first`."""
    return first.to(tl.uint32) + step.to(tl.int64).to(tl.uint32)


@triton.jit
def _words(turn, start, BLOCK: tl.constexpr):
    """The words of the sequence for a block's elements, whole numbers of 16 bits."""
    return ((turn + (start + tl.arange(0, BLOCK)).to(tl.uint32)) * _GOLDEN) >> 16


@triton.jit
def _round_to_whole(v):
    """Whole numbers below 2^23 are all there is of 23 bits: the sum rounds to nearest."""
    return tl.where(v < 2.0**23, (v + 2.0**23) - 2.0**23, v)


@triton.jit
def _join(param, correction):
    """Master weights: see `compression.join`."""
    HALF: tl.constexpr = param.dtype == tl.float16
    BITS: tl.constexpr = correction.dtype.primitive_bitwidth
    CUT: tl.constexpr = (13 if HALF else 16) - BITS
    raw = param.to(tl.uint16, bitcast=True).to(tl.uint32)
    code, sign = raw & 0x7FFF, (raw & 0x8000) << 16
    size = (code << BITS) + correction.to(tl.int32).to(tl.uint32)
    size = tl.where(size < 0x80000000, size, 0)
    if HALF:
        normal = (size << CUT if CUT > 0 else size >> -CUT) + (112 << 23)
        small = size.to(tl.int32).to(tl.float32) * 2.0 ** -(24 + BITS)
        bits = tl.where(size < (1 << (10 + BITS)), small.to(tl.uint32, bitcast=True), normal)
        bits = tl.where(code < 0x7C00, bits, (code << 13) + (0x7F800000 - (0x7C00 << 13)))
    else:
        bits = tl.where(code < 0x7F80, size << CUT, code << 16)
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def _split(value, param, correction):
    """Parameters and corrections in the dtypes of others: see `compression.split`."""
    HALF: tl.constexpr = param.dtype == tl.float16
    BITS: tl.constexpr = correction.dtype.primitive_bitwidth
    CUT: tl.constexpr = (13 if HALF else 16) - BITS
    INFINITY: tl.constexpr = 0x7C00 if HALF else 0x7F80
    NAN: tl.constexpr = 0x7E00 if HALF else 0x7FC0
    word = value.to(tl.uint32, bitcast=True)
    size = word & 0x7FFFFFFF
    # Sizes of small numbers wrap around here, and are not used.
    magnitude = size - (112 << 23) if HALF else size
    if CUT > 0:
        magnitude = (magnitude + ((1 << (CUT - 1)) - 1) + (magnitude >> CUT & 1)) >> CUT
    elif CUT < 0:
        magnitude = magnitude << -CUT
    if HALF:
        is_small = size < 0x38800000
        small = tl.where(is_small, size, 0).to(tl.float32, bitcast=True)
        units = _round_to_whole(small * 2.0 ** (24 + BITS)).to(tl.int32).to(tl.uint32)
        # float16 ends below 2^16, whose magnitudes would not fit 32 bits.
        magnitude = tl.where(size < 0x47800000, magnitude, INFINITY << BITS)
        magnitude = tl.where(is_small, units, magnitude)
    code = (magnitude + (1 << (BITS - 1))) >> BITS
    is_finite = code < INFINITY
    rest = tl.where(is_finite, magnitude - (code << BITS), 0)
    code = tl.where(is_finite, code, INFINITY)
    code = tl.where(size > 0x7F800000, NAN, code) | (word >> 16 & 0x8000)
    return code.to(tl.uint16).to(param.dtype, bitcast=True), rest.to(correction.dtype)


@triton.jit
def _spread(of_groups, BLOCK: tl.constexpr):
    """A number of each group as one of each element."""
    return tl.broadcast_to(of_groups[:, None], [BLOCK // GROUP, GROUP]).reshape([BLOCK])


@triton.jit
def _decode(codes, scale, BLOCK: tl.constexpr):
    """What codes of groups with these scales stand for: see `compression.decode`."""
    MOST: tl.constexpr = 127.0 if codes.dtype == tl.int8 else 255.0
    q = codes.to(tl.float32)
    value = q * tl.abs(q) * (1.0 / (MOST * MOST)) * _spread(scale, BLOCK)
    return value if codes.dtype == tl.int8 else value * value


@triton.jit
def _encode(value, codes, turn, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The codes, in the dtype of others, and the scales of a state: see `compression.encode`."""
    MOST: tl.constexpr = 127.0 if codes.dtype == tl.int8 else 255.0
    lanes = start + tl.arange(0, BLOCK)
    size = tl.abs(value) if codes.dtype == tl.int8 else square_root(value)
    # Magnitudes as integers are in order, NaN above infinity.
    bits = size.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not WIDE:
        bits = tl.where(lanes < length, bits, 0)
    largest = tl.max(bits.reshape([BLOCK // GROUP, GROUP]), axis=1)
    largest = tl.where(largest > 0x7F7FFFFF, 0x7FC00000, largest)
    scale = largest.to(tl.float32, bitcast=True)
    scale = tl.where(scale < 2.0**-100, 0.0, scale)
    whole = tl.full([BLOCK // GROUP], MOST * MOST, tl.float32)
    factor = tl.where(scale > 0, divide(whole, scale), 0.0)
    root = square_root(size * _spread(factor, BLOCK))
    root = tl.where(root < MOST, root, MOST)
    q = (root + _words(turn, start, BLOCK).to(tl.int32).to(tl.float32) * 2.0**-16).to(tl.int32)
    if codes.dtype == tl.int8:
        q = tl.where(value < 0, -q, q)
    else:
        q = tl.where((value > 0) & (q < 1), 1, q)
    return q.to(codes.dtype), scale
