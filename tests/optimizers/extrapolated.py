"""A problem for optimizers whose parameters hold a point ahead of x between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 8e-3}
"""How far runs of a dozen steps may lie from those in float64."""

ADAMW: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 0.03, "weight_decay": 0.0}


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(3)
    shapes = (4, 5), (7,), ()
    return [
        nn.Parameter(torch.rand(s, generator=gen, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def gradient(x: Tensor) -> Tensor:
    """The gradient of the sum of 2 x^2 + cos x."""
    return 4 * x - x.sin()


def set_gradients(params: list[nn.Parameter], sign: float = 1.0) -> None:
    for p in params:
        p.grad = sign * gradient(p.detach().double()).to(p.dtype)


def train(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    sign = -1.0 if opt.param_groups[0]["maximize"] else 1.0
    for _ in range(steps):
        set_gradients(params, sign)
        opt.step()


def loss_of(params: Sequence[nn.Parameter]) -> Tensor:
    """The function of which `gradient` is the gradient."""
    loss = sum((2 * p.square() + p.cos()).sum() for p in params)
    assert isinstance(loss, Tensor)
    return loss


def distance(params: Sequence[Tensor], values: Sequence[Tensor]) -> float:
    pairs = zip(params, values, strict=True)
    return max((p.detach().double() - v).abs().max().item() for p, v in pairs)


class Formula:
    """AdamW with an extrapolation in float64, on x and the moments."""

    def __init__(self, params: list[nn.Parameter], **options: Any) -> None:
        self.x = [p.detach().double().clone() for p in params]
        self.m, self.v = ([torch.zeros_like(x) for x in self.x] for _ in range(2))
        self.options, self.steps = ADAMW | options, 0

    def u(self) -> list[Tensor]:
        if self.steps == 0:
            return self.m
        beta1, beta2 = (1 - float(beta) ** self.steps for beta in self.options["betas"])
        return [
            m / beta1 / ((v / beta2).sqrt() + self.options["eps"])
            for m, v in zip(self.m, self.v, strict=True)
        ]

    def y(self, e: float) -> list[Tensor]:
        return [x - e * u for x, u in zip(self.x, self.u(), strict=True)]

    def step(self, e: float, rho: float = 0.0) -> None:
        """Take a step with the gradient at y, or where USAM's ascent leads from there."""
        lr, decay = float(self.options["lr"]), self.options["weight_decay"]
        beta1, beta2 = map(float, self.options["betas"])
        ys = self.y(e)
        gs = [gradient(y + rho * gradient(y)) for y in ys]
        self.m = [beta1 * m + (1 - beta1) * g for m, g in zip(self.m, gs, strict=True)]
        self.v = [beta2 * v + (1 - beta2) * g * g for v, g in zip(self.v, gs, strict=True)]
        self.steps += 1
        triples = zip(self.x, ys, self.u(), strict=True)
        self.x = [x - lr * (u + decay * y) for x, y, u in triples]
