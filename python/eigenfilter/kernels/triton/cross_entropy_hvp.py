"""`kernels.cross_entropy_hvp` in Triton: a program has a row, and reads it twice."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from eigenfilter.kernels.triton.launch import on_device
from eigenfilter.kernels.triton.rows import OPTIONS, TILE


@triton.jit
def cross_entropy_hvp_kernel(
    product, logits, u, scales, means, columns, LEAST: tl.constexpr, TILE: tl.constexpr
):
    """m <- p . u, product <- s (p u - m p) in the program's row; LEAST: the least finite number."""
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    scale = tl.load(scales + row)
    lanes = tl.arange(0, TILE)
    # Each lane has the largest logit so far, and sums relative to its exponential.
    largest = tl.full((TILE,), LEAST, logits.dtype.element_ty)
    total = tl.zeros((TILE,), tl.float64)
    products = tl.zeros((TILE,), tl.float64)
    if scale == 0:
        for first in range(0, columns, TILE):
            at = first + lanes
            zeros = tl.zeros((TILE,), product.dtype.element_ty)
            tl.store(product + start + at, zeros, mask=at < columns)
        tl.store(means + row, tl.zeros((), tl.float64))
    else:
        for first in range(0, columns, TILE):
            at = first + lanes
            inside = at < columns
            z = tl.load(logits + start + at, mask=inside, other=-float("inf"))
            v = tl.load(u + start + at, mask=inside, other=0.0)
            greater = tl.where(z > largest, z, largest)  # NaN is not
            before = tl.exp(largest - greater).to(tl.float64)
            e = tl.exp(z - greater).to(tl.float64)
            total = total * before + e
            products = products * before + e * v.to(tl.float64)
            largest = greater
        top = tl.max(largest, axis=0)
        later = tl.exp(largest - top).to(tl.float64)
        sum_of_all = tl.sum(total * later, axis=0)
        mean = tl.sum(products * later, axis=0) / sum_of_all
        factor = (scale / sum_of_all).to(product.dtype.element_ty)
        center = mean.to(product.dtype.element_ty)
        tl.store(means + row, mean)
        for first in range(0, columns, TILE):
            at = first + lanes
            inside = at < columns
            z = tl.load(logits + start + at, mask=inside, other=-float("inf"))
            v = tl.load(u + start + at, mask=inside, other=0.0)
            tl.store(product + start + at, factor * tl.exp(z - top) * (v - center), mask=inside)


def run(_table: None, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.cross_entropy_hvp`."""
    rows, columns = call.out.shape
    u = call.out if call.u is None else call.u
    least = torch.finfo(call.out.dtype).min
    with on_device(call.out.device):
        cross_entropy_hvp_kernel[(rows,)](
            call.out,
            call.logits,
            u,
            call.scales,
            call.means,
            columns,
            LEAST=least,
            TILE=TILE,
            **OPTIONS,
        )
