"""Triton device code of the kernels over vectors of one type: a program has a tile of columns.

Every tile stores its sums apart, and they are added in one fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

TILE = 1024  # columns
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _columns(columns, TILE: tl.constexpr):
    """The columns of this program in a row, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    return at, at < columns


@triton.jit
def _put(sums, first, second):
    """sums[k, row, tile] <- the program's k-th sum."""
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + at, tl.sum(first, axis=0))
    tl.store(sums + tl.num_programs(1) * tl.num_programs(0) + at, tl.sum(second, axis=0))


@triton.jit
def row_dots_kernel(q, w, sums, columns, TILE: tl.constexpr):
    """sums[:, row, tile] <- q . w and w . w over the tile's columns."""
    at, inside = _columns(columns, TILE)
    row = tl.program_id(1).to(tl.int64) * columns
    present = tl.load(q + row + at, mask=inside, other=0.0).to(tl.float64)
    product = tl.load(w + row + at, mask=inside, other=0.0).to(tl.float64)
    _put(sums, present * product, product * product)


@triton.jit(do_not_specialize=["rows"])
def lanczos_step_kernel(u, q, w, factors, sums, rows, columns, TILE: tl.constexpr):
    """u <- f_0 w + f_1 q + f_2 u, sums[:, row, tile] <- u . u and u . q over the tile's columns."""
    at, inside = _columns(columns, TILE)
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
    _put(sums, after * after, after * present)


@triton.jit(do_not_specialize=["rows"])
def gram_kernel(vectors, sums, rows, columns, TILE: tl.constexpr):
    """sums[i, j, tile] <- v_i . v_j over the tile's columns."""
    at, inside = _columns(columns, TILE)
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


@triton.jit(do_not_specialize=["rows"])
def mix_rows_kernel(vectors, factors, rows, columns, TILE: tl.constexpr):
    """v_i <- sum_{j <= i} factors[i, j] v_j in the tile's columns, the last row first."""
    at, inside = _columns(columns, TILE)
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


@triton.jit(do_not_specialize=["tiles"])
def add_sums_kernel(sums, tiles, out, TILE: tl.constexpr):
    """out[i] <- the sum of all tiles' sums[i]."""
    at = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, tiles, TILE):
        lanes = start + tl.arange(0, TILE)
        total += tl.load(sums + at * tiles + lanes, mask=lanes < tiles, other=0.0)
    tl.store(out + at, tl.sum(total, axis=0))
