"""Compiled models train as uncompiled ones, and a compiled step does what the step does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Any]] = {
    "SGD": lambda p: ef.SGD(p, **SETTINGS),
    "USAM": lambda p: ef.USAM(p, **SETTINGS, rho=0.15),
    "ASAM": lambda p: ef.SAM(p, **SETTINGS, rho=0.15, adaptive=True),
    "TwoStepUSAM": lambda p: ef.TwoStepUSAM(p, **SETTINGS, rho=0.15),
    "HessianUSAM": lambda p: ef.HessianUSAM(p, **SETTINGS, rho=0.02),
    "AdamW": lambda p: ef.AdamW(p, lr=0.03, method="sam", rho=0.15),
    "SharpnessAware": lambda p: ef.SharpnessAware(torch.optim.AdamW(p, lr=0.03), "sam", 0.15),
}


def train(
    make: Callable[[Iterable[nn.Parameter]], Any], compiled: str, backend: str
) -> list[Tensor]:
    """Parameters after some steps of a small network, in float64."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs = torch.randn(10, 6, dtype=torch.float64)
    targets = inputs.sin().sum(dim=1, keepdim=True)
    opt = make(model.parameters())
    function = torch.compile(model, backend=backend) if compiled == "model" else model

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (function(inputs) - targets).square().mean()
        loss.backward()
        return loss

    def step() -> None:
        opt.step(closure)

    if compiled == "step":
        step = torch.compile(step, backend=backend)
    for _ in range(4):
        step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*record_function.*")
@pytest.mark.parametrize("compiled", ["model", "step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_training_is_training(name: str, compiled: str) -> None:
    expected = train(OPTIMIZERS[name], "nothing", "eager")
    torch.compiler.reset()
    result = train(OPTIMIZERS[name], compiled, "aot_eager")
    bound = 1e-8 if name == "HessianUSAM" else 1e-14  # finite differences blow roundings up
    assert max(float((a - b).abs().max()) for a, b in zip(result, expected, strict=True)) <= bound


def test_with_the_default_compiler() -> None:
    expected = train(OPTIMIZERS["USAM"], "nothing", "eager")
    torch.compiler.reset()
    result = train(OPTIMIZERS["USAM"], "model", "inductor")
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
