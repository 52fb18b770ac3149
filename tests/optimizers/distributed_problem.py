"""The problem that several processes and a single one solve, which should agree.

Models are float64, so that results differ from a single process's by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import eigenfilter as ef

WORLD = 2  # processes
STEPS = 4
SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "rho": 0.15}
PLAIN = {name: value for name, value in SETTINGS.items() if name != "rho"}

Make = Callable[[Any], Any]

OPTIMIZERS: dict[str, Make] = {
    "usam": lambda params: ef.USAM(params, **SETTINGS),
    "sam": lambda params: ef.SAM(params, **SETTINGS),
    "asam": lambda params: ef.SAM(params, **SETTINGS, adaptive=True),
    "sequential": lambda params: ef.TwoStepUSAM(params, **SETTINGS),
    "anchored": lambda params: ef.TwoStepUSAM(params, **SETTINGS, ascent="anchored"),
    "difference": lambda params: ef.HessianUSAM(params, **SETTINGS | {"rho": 0.02}),
    "adamw": lambda params: ef.AdamW(params, lr=0.05, eps=0.02, method="sam", rho=0.15),
    "wrapper": lambda params: ef.SharpnessAware(
        torch.optim.AdamW(params, lr=0.05, eps=0.02), "two_step_usam", rho=0.15
    ),
}

# Every optimizer that ascends, as a class with its arguments.
ASCENDING: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "usam": (ef.USAM, SETTINGS),
    "sam": (ef.SAM, SETTINGS),
    "asam": (ef.SAM, SETTINGS | {"adaptive": True}),
    "sequential": (ef.TwoStepUSAM, SETTINGS),
    "difference": (ef.HessianUSAM, SETTINGS),
    "product": (ef.HessianUSAM, SETTINGS | {"hvp": "autograd"}),
    "adamw": (ef.AdamW, {"lr": 0.05, "rho": 0.15}),
    "adamw sam": (ef.AdamW, {"lr": 0.05, "rho": 0.15, "method": "sam"}),
    "tensor rho": (ef.USAM, SETTINGS | {"rho": torch.tensor(0.15)}),
    "wrapper": (lambda params, **kw: ef.SharpnessAware(torch.optim.SGD(params, **kw)), PLAIN),
}


def network() -> nn.Sequential:
    """Layers that two processes cannot share evenly: 5 rows, and 1."""
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


class Block(nn.Module):
    """A module of a program, which the compiler compiles; it passes over torch's containers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output


def batch(part: slice) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a part of eight samples."""
    generator = torch.Generator().manual_seed(12)
    inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return inputs[part], inputs[part].sin().sum(dim=1, keepdim=True)


def share(rank: int) -> slice:
    return slice(rank * 4, rank * 4 + 4)


def evaluation(opt: torch.optim.Optimizer, model: nn.Module, part: slice) -> Callable[[], Tensor]:
    """A closure that leaves the gradient of the mean over a part of the samples."""
    inputs, targets = batch(part)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    return closure


def full(params: Iterable[Tensor]) -> list[Tensor]:
    """Whole parameters, of DTensors too (collective)."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in params]


def train(opt: Any, model: nn.Module, part: slice) -> list[Tensor]:
    """Parameters after some steps on a part of the samples."""
    closure = evaluation(opt, model, part)
    for _ in range(STEPS):
        opt.step(closure)
    return full(model.parameters())


def train_alone(make: Make = OPTIMIZERS["usam"]) -> list[Tensor]:
    """Parameters after the same steps in one process on all samples."""
    model = network()
    return train(make(model.parameters()), model, slice(None))


def descent_norm_alone() -> float:
    """Norm of the gradient of USAM's first descent, in one process on all samples."""
    model = network()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, slice(None))
    closure()
    opt.ascend()
    closure()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()


def error_message(act: Callable[[], Any]) -> str:
    """The message of the error that `act` raises, or nothing."""
    try:
        act()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return ""


# A single parameter of one element, of which one of two processes has nothing.

INPUTS = torch.tensor([[1.0], [2.0]], dtype=torch.float64)


def single() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(1, 1, bias=False).double()


def single_loss(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs).cos() - 0.3).square().mean()


# FullyShardedDataParallel (FSDP1), whose flat parameters are no DTensors.


def flattened(
    original: bool, model: nn.Module | None = None, **kw: Any
) -> FullyShardedDataParallel:
    """The network under FSDP1, with its original parameters or with flat ones."""
    return FullyShardedDataParallel(
        model or network(), use_orig_params=original, device_id=torch.device("cpu"), **kw
    )


def full_weight(model: FullyShardedDataParallel) -> Tensor:
    """All elements of the parameters; those that are flat may end with padding."""
    with FullyShardedDataParallel.summon_full_params(model):
        return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_flat(actual: Tensor, expected: Iterable[Tensor]) -> None:
    """A gathered flat parameter, whose end is padding, holds the expected parameters."""
    whole = torch.cat([p.detach().flatten() for p in expected])
    torch.testing.assert_close(actual[: len(whole)], whole, rtol=1e-12, atol=1e-12)


def step_with_released_gradients(model: nn.Module, rank: int) -> str:
    """Return the refusal of gradients that would be applied before they are reduced."""
    before = full(model.parameters())
    opt = ef.SGD(model.parameters(), lr=0.1, release_gradients=True)
    message = error_message(lambda: opt.step(evaluation(opt, model, share(rank))))
    assert all(map(torch.equal, full(model.parameters()), before))
    return message
