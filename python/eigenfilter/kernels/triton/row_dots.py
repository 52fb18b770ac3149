"""`kernels.row_dots` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from eigenfilter.kernels.triton.rows import columns_of, over_columns, put


@triton.jit
def row_dots_kernel(q, w, sums, columns, TILE: tl.constexpr):
    """sums[:, row, tile] <- q . w and w . w over the tile's columns."""
    at, inside = columns_of(columns, TILE)
    row = tl.program_id(1).to(tl.int64) * columns
    present = tl.load(q + row + at, mask=inside, other=0.0).to(tl.float64)
    product = tl.load(w + row + at, mask=inside, other=0.0).to(tl.float64)
    put(sums, present * product, product * product)


def run(_table: None, call: SimpleNamespace) -> None:
    """Launch the kernels: see `eigenfilter.kernels.row_dots`."""
    over_columns(row_dots_kernel, call.q, (call.q, call.w), call.sums)
