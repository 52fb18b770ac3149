"""A problem for optimizers whose parameters hold a point ahead of x between steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 8e-3}
"""How far runs of a dozen steps may lie from those in float64."""


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
