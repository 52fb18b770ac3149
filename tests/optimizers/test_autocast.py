"""An outer autocast keeps narrow copies of the weights, never those of another point."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import same_bits

METHODS: dict[str, Callable[..., ef.optimizers.EigenfilterOptimizer]] = {
    "sgd": lambda p: ef.SGD(p, lr=0.1, momentum=0.9, extrapolation=0.2),
    "adamw ahead": lambda p: ef.AdamW(p, lr=0.1, extrapolation=0.2),
    "usam": lambda p: ef.USAM(p, lr=0.1, rho=0.3),
    "sam": lambda p: ef.SAM(p, lr=0.1, rho=0.3),
    "two_step_usam": lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=0.3),
    "adamw": lambda p: ef.AdamW(p, lr=0.1, method="usam", rho=0.3),
    "released": lambda p: ef.USAM(p, lr=0.1, rho=0.3, release_gradients=True),
    "wrapper": lambda p: ef.SharpnessAware(torch.optim.SGD(p, lr=0.1), "usam", rho=0.3),
}


def train(method: str, outer: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    inputs, targets = torch.randn(16, 3), torch.randn(16, 1)
    opt = METHODS[method](model.parameters())

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    def closure() -> Tensor:
        opt.zero_grad()
        with autocast():
            loss = (model(inputs).float() - targets).square().mean()
        loss.backward()
        return loss

    with autocast() if outer == "training" else nullcontext():
        for _ in range(3):
            with autocast() if outer == "step" else nullcontext():
                opt.step(closure)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("outer", ["step", "training"])
@pytest.mark.parametrize("method", METHODS)
def test_an_outer_autocast_changes_nothing(method: str, outer: str) -> None:
    assert all(map(same_bits, train(method, outer), train(method, "none")))


def test_the_weights_are_cached() -> None:
    """Otherwise the test above would say nothing."""
    p = nn.Parameter(torch.ones(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        before = torch.ones(2, 2) @ p
        with torch.no_grad():
            p.mul_(3)
        assert torch.equal(torch.ones(2, 2) @ p, before)
