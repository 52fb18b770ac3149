"""Small problems for the tests of certificates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter.curvature import HessianOperator
from quadratics import Quadratic

Build = Callable[[Any], torch.optim.Optimizer]


def certify(task: Quadratic, opt: torch.optim.Optimizer, **options: Any) -> ef.Certificate:
    return ef.certify(task, task.loss, task.data, opt, seed=0, **options)


def spectrum(low: float, high: float, *more: float) -> Tensor:
    bulk = torch.linspace(low, high, 50, dtype=torch.float64)
    return torch.cat([bulk, torch.tensor(more, dtype=torch.float64)])


SGD: Build = lambda p: ef.SGD(p, lr=0.2)  # noqa: E731  (edge 10)
USAM: Build = lambda p: ef.USAM(p, lr=0.2, rho=0.05)  # noqa: E731  ([-27.3, -20] and [0, 7.32])


class Network:
    """A small tanh network on a fixed batch."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.x = torch.randn(30, 4, dtype=torch.float64)
        self.y = self.x[:, :2].sin()
        self.loss = nn.MSELoss()
        self.op = HessianOperator(self.model, self.loss, (self.x, self.y))

    def step(self, opt: Any, steps: int = 1) -> None:
        for _ in range(steps):
            if hasattr(opt, "evaluation"):
                opt.step(lambda: self.closure(opt))
            else:
                self.closure(opt)
                opt.step()

    def closure(self, opt: Any) -> Tensor:
        opt.zero_grad()
        value = self.loss(self.model(self.x), self.y)
        value.backward(create_graph=getattr(opt, "needs_graph", False))
        return value

    def certify(self, opt: torch.optim.Optimizer, **options: Any) -> ef.Certificate:
        return ef.certify(self.model, self.loss, (self.x, self.y), opt, seed=0, **options)

    def point(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def dense(self) -> Tensor:
        return self.op.matmat(torch.eye(self.op.shape[0], dtype=torch.float64))
