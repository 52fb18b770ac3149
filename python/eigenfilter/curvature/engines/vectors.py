"""Flat vectors as the pieces that belong to parameters, and sums of products. Nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return views of v [..., n], shaped [..., *p.shape] for each parameter p."""
    flat = torch.split(v, [p.numel() for p in params], dim=-1)
    return [piece.view((*v.shape[:-1], *p.shape)) for piece, p in zip(flat, params, strict=True)]


class Sums:
    """sum_b w_b H_b V and sum_b w_b, as far as batches have been added."""

    def __init__(self, like: Tensor, params: Sequence[Tensor]) -> None:
        """Start at zero, for products with V [n, b] as `like`."""
        self.rows = torch.zeros(
            like.shape[1], like.shape[0], dtype=like.dtype, device=like.device
        )  # [b, n], the transposed products
        self.weight = 0.0
        self._block = split(self.rows, params)

    def add(self, products: Sequence[Tensor | None], weight: float, rows: int | slice) -> None:
        """Add weight times the products, in pieces, with one vector or several; None is zero."""
        for total, product in zip(self._block, products, strict=True):
            if product is not None:
                total[rows].add_(product, alpha=weight)
