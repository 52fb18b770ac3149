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
        self._each = [split(row, params) for row in self.rows]

    def add(self, products: Sequence[Tensor | None], weight: float, row: int | None = None) -> None:
        """Add weight times products, in pieces: of one vector, or with row=None of all [b, ...].

        None stands for zero.
        """
        into = self._block if row is None else self._each[row]
        for total, product in zip(into, products, strict=True):
            if product is not None:
                total.add_(product, alpha=weight)
