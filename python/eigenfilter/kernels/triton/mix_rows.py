"""`kernels.mix_rows` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from eigenfilter.kernels.triton.launch import on_device
from eigenfilter.kernels.triton.rows import OPTIONS, TILE, columns_of


@triton.jit(do_not_specialize=["rows"])
def mix_rows_kernel(vectors, factors, rows, columns, TILE: tl.constexpr):
    """v_i <- sum_{j <= i} factors[i, j] v_j in the tile's columns, the last row first."""
    at, inside = columns_of(columns, TILE)
    to = vectors + at
    for _ in range(rows - 1):
        to += columns
    for k in range(rows):
        i = rows - 1 - k
        total = tl.zeros((TILE,), tl.float64)
        row = vectors + at
        for j in range(i + 1):
            value = tl.load(row, mask=inside, other=0.0).to(tl.float64)
            total += tl.load(factors + i * rows + j) * value
            row += columns
        tl.store(to, total.to(vectors.dtype.element_ty), mask=inside)
        to -= columns


def run(_table: None, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.mix_rows`."""
    rows, columns = call.vectors.shape
    grid = (triton.cdiv(columns, TILE),)
    with on_device(call.vectors.device):
        mix_rows_kernel[grid](call.vectors, call.factors, rows, columns, TILE=TILE, **OPTIONS)
