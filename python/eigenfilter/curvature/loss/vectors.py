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
        self.weight = 0.0
        self._rows = torch.empty(like.shape[1], like.shape[0], dtype=like.dtype, device=like.device)
        self._block = split(self._rows, params)
        self._begun = [False] * like.shape[1]  # which rows hold a sum

    @property
    def rows(self) -> Tensor:
        """The transposed products [b, n]."""
        for row, begun in enumerate(self._begun):
            if not begun:
                self._rows[row].zero_()
                self._begun[row] = True
        return self._rows

    def add(self, products: Sequence[Tensor | None], weight: float, rows: int | slice) -> None:
        """Add weight times the products, in pieces, with one vector or several; None is zero.

        With weight 0 nothing is added, whatever they are.
        """
        if weight == 0:
            return
        span = rows if isinstance(rows, slice) else slice(rows, rows + 1)
        begun = all(self._begun[span])
        self._begun[span] = [True] * len(self._begun[span])
        totals, found = [], []
        for total, product in zip(self._block, products, strict=True):
            if product is not None:
                totals.append(total[rows])
                found.append(product)
            elif not begun:
                total[rows].zero_()
        if not found:
            return
        if begun:
            torch._foreach_add_(totals, found, alpha=weight)
        else:
            torch._foreach_copy_(totals, found)
            if weight != 1.0:
                torch._foreach_mul_(totals, weight)
