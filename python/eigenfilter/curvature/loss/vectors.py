"""Views of flat vectors in the shapes of the parameters, and sums of products over batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return views of v [..., n], shaped [..., *p.shape] for each parameter p."""
    flat = torch.split(v, [p.numel() for p in params], dim=-1)
    return [piece.view((*v.shape[:-1], *p.shape)) for piece, p in zip(flat, params, strict=True)]


class Sums:
    """sum_b w_b H_b V and sum_b w_b over the batches added so far."""

    def __init__(self, like: Tensor, params: Sequence[Tensor]) -> None:
        """Start at zero, for products with V [n, b] of the shape of `like`."""
        self.weight = 0.0
        self._rows = torch.empty(like.shape[1], like.shape[0], dtype=like.dtype, device=like.device)
        self._block = split(self._rows, params)
        self._initialized = [False] * like.shape[1]  # which rows contain a sum

    @property
    def rows(self) -> Tensor:
        """The transposed products [b, n]."""
        for row, initialized in enumerate(self._initialized):
            if not initialized:
                self._rows[row].zero_()
                self._initialized[row] = True
        return self._rows

    def add(self, products: Sequence[Tensor | None], weight: float, rows: int | slice) -> None:
        """Add weight times the products with one vector or several.

        Args:
            products: in the shapes of the parameters; None is zero.
            weight: w_b. If it is 0 nothing is added, even if products are not finite.
            rows: the indices of the vectors.
        """
        if weight == 0:
            return
        span = rows if isinstance(rows, slice) else slice(rows, rows + 1)
        initialized = all(self._initialized[span])
        self._initialized[span] = [True] * len(self._initialized[span])
        totals, terms = [], []
        for total, product in zip(self._block, products, strict=True):
            if product is not None:
                totals.append(total[rows])
                terms.append(product)
            elif not initialized:
                total[rows].zero_()
        if not terms:
            return
        if initialized:
            torch._foreach_add_(totals, terms, alpha=weight)
        else:
            torch._foreach_copy_(totals, terms)
            if weight != 1.0:
                torch._foreach_mul_(totals, weight)
