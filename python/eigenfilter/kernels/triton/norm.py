"""`kernels.norm` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from eigenfilter.kernels.conventions import Table
from eigenfilter.kernels.triton.compression import decoded, read_scales
from eigenfilter.kernels.triton.device import (
    GROUP,
    OPTIONS,
    address,
    chunk,
    inverse,
    load,
    square_root,
)
from eigenfilter.kernels.triton.launch import dtype_of, launch_chunks, on_device, scale_of
from eigenfilter.kernels.triton.tables import tables

# One program adds the sums of all others, so it gets many warps.
NORM_OPTIONS = OPTIONS | {"num_warps": 16}
NORM_BLOCK = 8192

# The exponent of a scale and its negative are those of normal numbers.
MOST_EXPONENT = tl.constexpr(1022)
# Far inside of the range of float64: no square that counts in a sum between them has vanished.
LEAST_SUM = tl.constexpr(2.0**-700)
GREATEST_SUM = tl.constexpr(2.0**700)


@triton.jit
def _power_of_two(exponent):
    """2^exponent in float64, for the exponent of a normal number."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent_of(value):
    """That of the greatest power of two that value > 0 reaches, as far as a scale may have it."""
    exponent = (value.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
    return tl.minimum(tl.maximum(exponent, -MOST_EXPONENT), MOST_EXPONENT)


@triton.jit
def _values(at, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Elements of t in float64; of w t if there are weights; what t stands for if it is codes."""
    t_at, w_at, scales_at = at
    t = load(t_at, start, length, BLOCK, WIDE)
    t = decoded(t, read_scales(scales_at, start, length, BLOCK), BLOCK).to(tl.float64)
    if w_at is not None:
        t = load(w_at, start, length, BLOCK, WIDE).to(tl.float64) * t
    if scales_at is not None:  # what is not there would be 0 times a scale, which may be NaN
        t = tl.where(start + tl.arange(0, BLOCK) < length, t, 0.0)
    return t


@triton.jit
def _sum_squares(at, scale, length, wide, BLOCK: tl.constexpr):
    """Sum of (scale w t)^2 over a chunk; without a scale it is 1."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, wide, BLOCK):
        t = _values(at, start, length, BLOCK, True)
        t = t if scale is None else t * scale
        total += t * t
    for start in range(wide, length, BLOCK):
        t = _values(at, start, length, BLOCK, False)
        t = t if scale is None else t * scale
        total += t * t
    return tl.sum(total, axis=0)


@triton.jit
def _largest(at, length, BLOCK: tl.constexpr):
    """Largest |w t| of a chunk."""
    largest = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, length, BLOCK):
        largest = tl.maximum(largest, tl.abs(_values(at, start, length, BLOCK, False)))
    return tl.max(largest, axis=0)


@triton.jit
def _in_range(total, exponent, at, length, BLOCK: tl.constexpr):
    """The sum of a chunk and its exponent, taken once more if its squares overflow or vanish."""
    if (total < LEAST_SUM) | (total > GREATEST_SUM):
        largest = _largest(at, length, BLOCK)
        if (largest > 0) & (largest < float("inf")):
            exponent = _exponent_of(largest)
            scale = _power_of_two(-exponent)
            total = _sum_squares(at, scale, length, 0, BLOCK)
    return total, exponent


@triton.jit(do_not_specialize=["n"])
def sum_squares_kernel(
    pointers,
    chunks,
    n,
    sums,
    exponents,
    WEIGHTS: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[program] 4^exponents[program] <- sum of (w t)^2, in an order free of alignment.

    The exponent is 0 unless squares of float64 elements overflow or vanish. There are exponents
    where a tensor is float64.
    """
    tensor, first, length, wide = chunk(chunks)
    t_at = address(pointers, tensor + n if WEIGHTS else tensor, first, GRAD)
    at = (
        t_at,
        address(pointers, tensor, first, DTYPE) if WEIGHTS else None,
        None if SCALE is None else address(pointers, tensor + n, first // GROUP, SCALE),
    )
    total = _sum_squares(at, None, length, wide, BLOCK)
    exponent = tl.full((), 0, tl.int32)
    if tl.float64 == GRAD:
        total, exponent = _in_range(total, exponent, at, length, BLOCK)
    tl.store(sums + tl.program_id(0), total)
    if exponents is not None:
        tl.store(exponents + tl.program_id(0), exponent)


@triton.jit(do_not_specialize=["count"])
def norm_kernel(sums, exponents, count, out, grad_scale, BLOCK: tl.constexpr):
    """out <- S sqrt(sum of `count` sums 4^exponents); one program, hence one order.

    The greatest exponent is taken out of the sum. Without exponents they are 0.
    """
    if exponents is not None:
        greatest = tl.full((BLOCK,), -MOST_EXPONENT, tl.int32)
        for start in range(0, count, BLOCK):
            exponent = load(exponents, start, count, BLOCK, False)
            counts = load(sums, start, count, BLOCK, False) != 0
            greatest = tl.where(counts, tl.maximum(greatest, exponent), greatest)
        most = tl.max(greatest, axis=0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        some = load(sums, start, count, BLOCK, False)
        if exponents is not None:
            exponent = load(exponents, start, count, BLOCK, False) - most
            scale = _power_of_two(tl.maximum(exponent, -MOST_EXPONENT))
            some = some * scale * scale
        total += some
    norm = square_root(tl.sum(total, axis=0))
    if exponents is not None:
        norm = norm * _power_of_two(most)
    norm = norm * inverse(grad_scale)
    tl.store(out, norm.to(out.dtype.element_ty))


def run(table: Table, call: SimpleNamespace) -> None:
    """Launch the kernels: see `eigenfilter.kernels.norm`."""
    like = (call.tensors if call.weights is None else call.weights)[0]
    with on_device(like.device):
        work = tables("norm", like, table)
        scale = scale_of(call.grad_scale, like.device)
        sums = torch.empty(work.programs, dtype=torch.float64, device=like.device)
        wide = torch.float64 in work.chunks
        exponents = sums.new_empty(work.programs, dtype=torch.int32) if wide else None
        done = 0
        for grad, chunks in work.chunks.items():
            at = (sums[done:], None if exponents is None else exponents[done:])
            variant = {
                "WEIGHTS": call.weights is not None,
                "SCALE": dtype_of(call.momentum_scales),
            }
            launch_chunks(sum_squares_kernel, like.dtype, work, grad, at, variant)
            done += chunks.shape[1]
        norm_kernel[(1,)](
            sums, exponents, work.programs, call.out, scale, BLOCK=NORM_BLOCK, **NORM_OPTIONS
        )
