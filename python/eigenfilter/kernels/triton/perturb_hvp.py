"""`kernels.perturb_hvp` in Triton."""

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
)
from eigenfilter.kernels.triton.launch import launch


@triton.jit
def _perturb_hvp_block(at, step, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, g0_at, b_at = at
    b = load(b_at, start, length, BLOCK, WIDE)
    g = load(g_at, start, length, BLOCK, WIDE).to(step.dtype)
    g0 = load(g0_at, start, length, BLOCK, WIDE).to(step.dtype)
    store(x_at, (b.to(step.dtype) + step * (g - g0)).to(b.dtype), start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n"])
def perturb_hvp_kernel(
    pointers,
    chunks,
    n,
    alpha: tl.float64,
    alpha_at,
    eps: tl.float64,
    eps_at,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- b + alpha h with h = S (g - g0) / eps."""
    tensor, first, length, wide = chunk(chunks)
    x_at = address(pointers, tensor, first, DTYPE)
    g_at = address(pointers, tensor + n, first, GRAD)
    g0_at = address(pointers, tensor + 2 * n, first, GRAD)
    b_at = address(pointers, tensor + 3 * n, first, DTYPE)
    step = (real(alpha, alpha_at) * inverse(grad_scale) / real(eps, eps_at)).to(REAL)
    if not is_set(found_inf):
        for_each_block(_perturb_hvp_block, (x_at, g_at, g0_at, b_at), step, length, wide, BLOCK)


def run(table: Table, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.perturb_hvp`."""
    launch(perturb_hvp_kernel, table, call)
