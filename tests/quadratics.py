"""Losses whose Hessian is a given matrix everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Quadratic(nn.Module):
    """f(x) = (x - 1)^T H (x - 1) / 2 in float64, whose minimum is its start."""

    def __init__(self, H: Tensor, pieces: list[int] | None = None) -> None:
        super().__init__()
        self.H = H.diag() if H.ndim == 1 else H
        sizes = [len(H)] if pieces is None else pieces
        ones = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in sizes]
        self.x = nn.ParameterList(ones)
        self.data: Any = (torch.zeros(1), torch.zeros(1))

    def forward(self, _: Tensor) -> Tensor:
        return torch.cat(list(self.x)) - 1

    def loss(self, output: Tensor, _: Tensor) -> Tensor:
        return 0.5 * output @ self.H @ output

    def move(self, size: float) -> None:
        """Move x at random, by `size` in each element on average."""
        with torch.no_grad():
            for piece in self.x:
                piece += size * torch.randn_like(piece)

    def train_with(self, opt: Any, steps: int) -> None:
        """Take steps."""

        def closure() -> Tensor:
            opt.zero_grad()
            value = self.loss(self(None), None)
            value.backward()
            return value

        for _ in range(steps):
            opt.step(closure)
