"""`kernels.perturb` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from eigenfilter.kernels.conventions import Table
from eigenfilter.kernels.triton.compression import (
    decoded,
    joined,
    read_corrections,
    read_scales,
    write_params,
)
from eigenfilter.kernels.triton.device import (
    GROUP,
    address,
    chunk,
    for_each_block,
    inverse,
    is_set,
    load,
    real,
    store,
)
from eigenfilter.kernels.triton.launch import dtype_of, launch


@triton.jit
def _perturb_block(at, rule, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, b_at, c_at, scales_at = at
    step, how, SAVE, ADAPTIVE = rule
    p = load(x_at if SAVE else b_at, start, length, BLOCK, WIDE)
    c = read_corrections(c_at, start, length, BLOCK, WIDE)
    x = joined(p, c).to(step.dtype)
    scales = read_scales(scales_at, start, length, BLOCK)
    g = decoded(load(g_at, start, length, BLOCK, WIDE), scales, BLOCK).to(step.dtype)
    if ADAPTIVE:
        g = x * x * g
    if SAVE:
        store(b_at, p, start, length, BLOCK, WIDE)
    write_params(x_at, c_at, p, c, x + step * g, how, start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n", "origin"])
def perturb_kernel(
    pointers,
    chunks,
    n,
    origin,
    alpha: tl.float64,
    alpha_at,
    grad_scale,
    found_inf,
    SAVE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    CORRECTION: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """b <- x where SAVE; x <- b + alpha S g (adaptive: b^2 g), b being the list `origin`.

    With scales g are codes; with corrections x stand for master weights.
    """
    tensor, first, length, wide = chunk(chunks)
    x_at = address(pointers, tensor, first, DTYPE)
    g_at = address(pointers, tensor + n, first, GRAD)
    b_at = address(pointers, tensor + origin * n, first, DTYPE)
    c_index = tensor + 2 * n  # compressed tensors have no backups
    scales_index = c_index if CORRECTION is None else c_index + n
    at = (
        x_at,
        g_at,
        b_at,
        None if CORRECTION is None else address(pointers, c_index, first, CORRECTION),
        None if SCALE is None else address(pointers, scales_index, first // GROUP, SCALE),
    )
    step = (real(alpha, alpha_at) * inverse(grad_scale)).to(REAL)
    stop = is_set(found_inf)
    rule = (step, (stop, None, None), SAVE, ADAPTIVE)
    if SAVE:
        for_each_block(_perturb_block, at, rule, length, wide, BLOCK)
    else:
        if not stop:  # else x stays unchanged, and nothing has to be read at all
            for_each_block(_perturb_block, at, rule, length, wide, BLOCK)


def run(table: Table, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.perturb`."""
    origin = 0 if call.backups is None else 2
    launch(
        perturb_kernel,
        table,
        call,
        origin=origin,
        SAVE=call.save,
        ADAPTIVE=call.adaptive,
        CORRECTION=dtype_of(call.corrections),
        SCALE=dtype_of(call.momentum_scales),
    )
