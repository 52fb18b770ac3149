"""A small network that an optimizer trains and a `SharpnessMonitor` watches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter import curvature


class Trained:
    """A small tanh network on a fixed batch, its operator and its closure."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        self.x = torch.randn(60, 8, dtype=torch.float64)
        self.y = self.x[:, :3].sin()
        self.loss = nn.MSELoss()
        self.op = curvature.HessianOperator(self.model, self.loss, (self.x, self.y))

    def train(self, opt: Any, monitor: ef.SharpnessMonitor, steps: int) -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            value = self.loss(self.model(self.x), self.y)
            value.backward()
            return value

        for _ in range(steps):
            opt.step(closure)
            monitor.step()

    def sharpness(self) -> float:
        return float(curvature.eigsh(self.op, 1, tol=1e-10).values[0])
