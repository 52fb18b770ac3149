"""`kernels.flag_nonfinite` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from eigenfilter.kernels.conventions import Table
from eigenfilter.kernels.triton.device import address, chunk, load
from eigenfilter.kernels.triton.launch import launch


@triton.jit(do_not_specialize=["n"])
def flag_nonfinite_kernel(
    pointers,
    chunks,
    n,
    found_inf,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found_inf <- 1 if an element is inf or NaN."""
    tensor, first, length, wide = chunk(chunks)
    at = address(pointers, tensor, first, GRAD)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, wide, BLOCK):
        t = load(at, start, length, BLOCK, True).to(REAL)
        bad |= tl.where(tl.abs(t) < float("inf"), 0, 1)
    for start in range(wide, length, BLOCK):
        t = load(at, start, length, BLOCK, False).to(REAL)
        bad |= tl.where(tl.abs(t) < float("inf"), 0, 1)
    if tl.max(bad, axis=0) != 0:
        tl.store(found_inf, 1.0)


def run(table: Table, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.flag_nonfinite`."""
    launch(flag_nonfinite_kernel, table, call)
