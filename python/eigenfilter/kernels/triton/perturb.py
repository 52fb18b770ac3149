"""`kernels.perturb` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from eigenfilter.kernels.conventions import Table
from eigenfilter.kernels.triton.device import (
    address,
    chunk,
    for_each_block,
    inverse,
    is_set,
    load,
    real,
    store,
    unless,
)
from eigenfilter.kernels.triton.launch import launch


@triton.jit
def _perturb_block(at, rule, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, b_at = at
    step, stop, SAVE, ADAPTIVE = rule
    p = load(x_at if SAVE else b_at, start, length, BLOCK, WIDE)
    g = load(g_at, start, length, BLOCK, WIDE).to(step.dtype)
    x = p.to(step.dtype)
    if ADAPTIVE:
        g = x * x * g
    after = (x + step * g).to(p.dtype)
    if SAVE:
        store(b_at, p, start, length, BLOCK, WIDE)
        after = unless(stop, p, after)
    store(x_at, after, start, length, BLOCK, WIDE)


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
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """b <- x where SAVE; x <- b + alpha S g (adaptive: b^2 g), b being the list `origin`."""
    tensor, first, length, wide = chunk(chunks)
    x_at = address(pointers, tensor, first, DTYPE)
    g_at = address(pointers, tensor + n, first, GRAD)
    b_at = address(pointers, tensor + origin * n, first, DTYPE)
    step = (real(alpha, alpha_at) * inverse(grad_scale)).to(REAL)
    stop = is_set(found_inf)
    rule = (step, stop, SAVE, ADAPTIVE)
    if SAVE:
        for_each_block(_perturb_block, (x_at, g_at, b_at), rule, length, wide, BLOCK)
    else:
        if not stop:  # else x stays unchanged, and nothing has to be read at all
            for_each_block(_perturb_block, (x_at, g_at, b_at), rule, length, wide, BLOCK)


def run(table: Table, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.perturb`."""
    origin = 0 if call.backups is None else 2
    launch(perturb_kernel, table, call, origin=origin, SAVE=call.save, ADAPTIVE=call.adaptive)
