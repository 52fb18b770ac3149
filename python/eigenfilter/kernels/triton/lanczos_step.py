"""`kernels.lanczos_step` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from eigenfilter.kernels.triton.rows import columns_of, over_columns, put


@triton.jit(do_not_specialize=["rows"])
def lanczos_step_kernel(u, q, w, factors, sums, rows, columns, TILE: tl.constexpr):
    """u <- f_0 w + f_1 q + f_2 u, sums[:, row, tile] <- u . u and u . q over the tile's columns."""
    at, inside = columns_of(columns, TILE)
    vector = tl.program_id(1)
    row = vector.to(tl.int64) * columns
    present = tl.load(q + row + at, mask=inside, other=0.0).to(tl.float64)
    product = tl.load(w + row + at, mask=inside, other=0.0).to(tl.float64)
    before = tl.load(u + row + at, mask=inside, other=0.0).to(tl.float64)
    of_w = tl.load(factors + vector)
    of_q = tl.load(factors + rows + vector)
    of_u = tl.load(factors + 2 * rows + vector)
    rounded = (of_w * product + of_q * present + of_u * before).to(u.dtype.element_ty)
    tl.store(u + row + at, rounded, mask=inside)
    # Columns beyond the end may have become NaN: infinity times zero.
    after = tl.where(inside, rounded.to(tl.float64), 0.0)
    put(sums, after * after, after * present)


def run(_table: None, call: SimpleNamespace) -> None:
    """Launch the kernels: see `eigenfilter.kernels.lanczos_step`."""
    inputs = (call.u, call.q, call.w, call.factors)
    over_columns(lanczos_step_kernel, call.u, inputs, call.sums, len(call.u))
