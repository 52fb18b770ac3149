"""`kernels.gram` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from eigenfilter.kernels.triton.rows import columns_of, over_columns


@triton.jit(do_not_specialize=["rows"])
def gram_kernel(vectors, sums, rows, columns, TILE: tl.constexpr):
    """sums[i, j, tile] <- v_i . v_j over the tile's columns."""
    at, inside = columns_of(columns, TILE)
    tiles, tile = tl.num_programs(0), tl.program_id(0)
    row = vectors + at
    for i in range(rows):
        first = tl.load(row, mask=inside, other=0.0).to(tl.float64)
        other = vectors + at
        for j in range(i + 1):
            second = tl.load(other, mask=inside, other=0.0).to(tl.float64)
            product = tl.sum(first * second, axis=0)
            tl.store(sums + (i * rows + j) * tiles + tile, product)
            tl.store(sums + (j * rows + i) * tiles + tile, product)
            other += columns
        row += columns


def run(_table: None, call: SimpleNamespace) -> None:
    """Launch the kernels: see `eigenfilter.kernels.gram`."""
    vectors = call.vectors
    over_columns(gram_kernel, vectors[:1], (vectors,), call.out, len(vectors))
