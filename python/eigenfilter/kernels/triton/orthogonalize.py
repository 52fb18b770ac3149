"""`kernels.orthogonalize` in Triton: a program has a tile of columns of one vector.

Every tile stores its sums apart, and they are added in one fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from eigenfilter.kernels.triton.launch import on_device
from eigenfilter.kernels.triton.rows import OPTIONS, TILE


@triton.jit(do_not_specialize=["rows"])
def dots_kernel(w, basis, sums, rows, columns, TILE: tl.constexpr):
    """sums[v, i, tile] <- q_i . w_v over the tile's columns."""
    tile, vector = tl.program_id(0), tl.program_id(1)
    at = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < columns
    wide = tl.load(w + vector.to(tl.int64) * columns + at, mask=inside, other=0.0).to(tl.float64)
    row = basis + at
    to = sums + vector.to(tl.int64) * rows * tl.num_programs(0) + tile
    for _ in range(rows):
        q = tl.load(row, mask=inside, other=0.0).to(tl.float64)
        tl.store(to, tl.sum(q * wide, axis=0))
        row += columns
        to += tl.num_programs(0)


@triton.jit(do_not_specialize=["tiles"])
def add_tiles_kernel(sums, tiles, out, coefficients, FIRST: tl.constexpr, TILE: tl.constexpr):
    """out[j] <- the sum of all tiles' sums[j], also added to coefficients[j]."""
    at = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, tiles, TILE):
        lanes = start + tl.arange(0, TILE)
        total += tl.load(sums + at * tiles + lanes, mask=lanes < tiles, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(out + at, result)
    before = 0.0 if FIRST else tl.load(coefficients + at)
    tl.store(coefficients + at, before + result)


@triton.jit(do_not_specialize=["rows"])
def subtract_kernel(w, basis, factors, squares, rows, columns, TILE: tl.constexpr):
    """w_v <- w_v - sum_i factors[v, i] q_i, squares[v, tile] <- the sum of their squares."""
    tile, vector = tl.program_id(0), tl.program_id(1)
    at = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < columns
    w_at = w + vector.to(tl.int64) * columns + at
    left = tl.load(w_at, mask=inside, other=0.0).to(tl.float64)
    row = basis + at
    factor = factors + vector.to(tl.int64) * rows
    for _ in range(rows):
        left -= tl.load(factor) * tl.load(row, mask=inside, other=0.0).to(tl.float64)
        row += columns
        factor += 1
    rounded = left.to(w.dtype.element_ty)
    tl.store(w_at, rounded, mask=inside)
    wide = rounded.to(tl.float64)
    tl.store(squares + vector * tl.num_programs(0) + tile, tl.sum(wide * wide, axis=0))


@triton.jit(do_not_specialize=["tiles"])
def norms_kernel(squares, tiles, norms, TILE: tl.constexpr):
    """norms[v] <- the root of the sum of all tiles' squares[v]."""
    vector = tl.program_id(0)
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, tiles, TILE):
        lanes = start + tl.arange(0, TILE)
        total += tl.load(squares + vector * tiles + lanes, mask=lanes < tiles, other=0.0)
    tl.store(norms + vector, tl.sqrt(tl.sum(total, axis=0)))


def run(_table: None, call: SimpleNamespace) -> None:
    """Launch the kernels: see `eigenfilter.kernels.orthogonalize`."""
    w, basis, coefficients = call.w, call.basis, call.coefficients
    rows, columns = basis.shape
    count = len(w) if w.ndim == 2 else 1
    tiles = triton.cdiv(columns, TILE)
    constants = {"TILE": TILE, **OPTIONS}
    with on_device(w.device):
        sums = w.new_empty(count * rows * tiles, dtype=torch.float64)
        squares = w.new_empty(count * tiles, dtype=torch.float64)
        factors = torch.empty_like(coefficients)
        grid = (tiles, count)
        for i in range(call.passes):
            if rows:
                dots_kernel[grid](w, basis, sums, rows, columns, **constants)
                add_tiles_kernel[(count * rows,)](
                    sums, tiles, factors, coefficients, FIRST=i == 0, **constants
                )
            subtract_kernel[grid](w, basis, factors, squares, rows, columns, **constants)
        norms_kernel[(count,)](squares, tiles, call.norms, **constants)
