"""Activations that are recomputed, or kept elsewhere, until backward: the steps are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eigenfilter as ef

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.8}

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Any]] = {
    "USAM": lambda p: ef.USAM(p, **SETTINGS, rho=0.15),
    "SAM": lambda p: ef.SAM(p, **SETTINGS, rho=0.15),
    "TwoStepUSAM": lambda p: ef.TwoStepUSAM(p, **SETTINGS, rho=0.15),
    "HessianUSAM": lambda p: ef.HessianUSAM(p, **SETTINGS, rho=0.02),
    "HessianUSAM, autograd": lambda p: ef.HessianUSAM(p, **SETTINGS, rho=0.02, hvp="autograd"),
    "released": lambda p: ef.USAM(p, **SETTINGS, rho=0.15, release_gradients=True),
    "released, two": lambda p: ef.TwoStepUSAM(p, **SETTINGS, rho=0.15, release_gradients=True),
    "SharpnessAware": lambda p: ef.SharpnessAware(torch.optim.AdamW(p, lr=0.03), "sam", 0.15),
}


class Network(nn.Module):
    """Two blocks with dropout, whose masks a recomputation has to repeat."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.run = run
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


def to_host() -> Any:
    """Saved tensors go to memory of their own, as those of a GPU go to the host, and come back."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda block, x: block(x),
    "recomputed": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "copied": to_host,
}


def train(name: str, run: str, context: Callable[[], Any] = nullcontext) -> list[Tensor]:
    model = Network(RUNS[run])
    opt = OPTIMIZERS[name](model.parameters())
    inputs = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)  # for reentrant blocks

    def closure() -> Tensor:
        opt.zero_grad()
        with context():
            loss = model(inputs).square().mean()
        loss.backward(create_graph=opt.needs_graph)
        return loss

    for _ in range(4):
        opt.step(closure)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:Using backward.*create_graph")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("run", ["recomputed", "reentrant"])
def test_recomputed_activations(name: str, run: str) -> None:
    if (name, run) == ("HessianUSAM, autograd", "reentrant"):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            train(name, run)
        return
    assert all(map(torch.equal, train(name, run), train(name, "plain")))


@pytest.mark.filterwarnings("ignore:Using backward.*create_graph")
@pytest.mark.parametrize(
    ("name", "context"),
    # A detached copy has no second derivative, which "HessianUSAM, autograd" needs.
    [(n, c) for n in OPTIMIZERS for c in CONTEXTS if (n, c) != ("HessianUSAM, autograd", "copied")],
)
def test_offloaded_activations(name: str, context: str) -> None:
    assert all(map(torch.equal, train(name, "plain", CONTEXTS[context]), train(name, "plain")))
