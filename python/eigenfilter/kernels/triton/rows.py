"""What the Triton kernels over rows of vectors share: a program has a tile of columns.

Every tile stores its sums apart, and they are added in one fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from eigenfilter.kernels.triton.launch import on_device

TILE = 1024  # columns
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def columns_of(columns, TILE: tl.constexpr):
    """The columns of this program in a row, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    return at, at < columns


@triton.jit
def put(sums, first, second):
    """sums[k, row, tile] <- the program's k-th sum."""
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + at, tl.sum(first, axis=0))
    tl.store(sums + tl.num_programs(1) * tl.num_programs(0) + at, tl.sum(second, axis=0))


@triton.jit(do_not_specialize=["tiles"])
def add_sums_kernel(sums, tiles, out, TILE: tl.constexpr):
    """out[i] <- the sum of all tiles' sums[i]."""
    at = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, tiles, TILE):
        lanes = start + tl.arange(0, TILE)
        total += tl.load(sums + at * tiles + lanes, mask=lanes < tiles, other=0.0)
    tl.store(out + at, tl.sum(total, axis=0))


def over_columns(
    kernel: Any, like: Tensor, inputs: tuple[Tensor, ...], sums: Tensor, *rows: int
) -> None:
    """Run a kernel on the tiles of `like` [b, n], a program a row and tile; add up its sums."""
    count, columns = like.shape
    tiles = triton.cdiv(columns, TILE)
    with on_device(sums.device):
        tile_sums = sums.new_empty(sums.numel() * tiles)
        kernel[(tiles, count)](*inputs, tile_sums, *rows, columns, TILE=TILE, **OPTIONS)
        add_sums_kernel[(sums.numel(),)](tile_sums, tiles, sums, TILE=TILE, **OPTIONS)
