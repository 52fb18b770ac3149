"""USAM in plain torch, for the frameworks that train beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import eigenfilter as ef

LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.1, 0.8, 0.01, 0.3
USAM = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "rho": RHO}
Batch = tuple[Tensor, Tensor]


def make_model(seed: int = 0) -> nn.Module:
    """A float64 model with running statistics and dropout."""
    torch.manual_seed(seed)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)
    return nn.Sequential(*layers).double()


def make_batches(count: int, size: int = 6) -> list[Batch]:
    """Batches of inputs and targets."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(7))
    return [
        (draw(size, 4, dtype=torch.float64), draw(size, 2, dtype=torch.float64))
        for _ in range(count)
    ]


class PlainUSAM:
    """x <- x - lr m with m <- momentum m + grad f(x + rho grad f(x)) + wd x, step by step.

    Args:
        model: model to train, in training mode.
        max_norm: largest norm of the descent's gradient; None does not clip.
        rho: radius of the ascent.
        loss_of: loss of the model on a batch.
        replicas: number of processes that ascend along the gradients of their own micro-batches,
            every replicas-th of a window.
    """

    def __init__(
        self,
        model: nn.Module,
        max_norm: float | None = None,
        rho: float = RHO,
        loss_of: Callable[[nn.Module, Batch], Tensor] | None = None,
        replicas: int = 1,
    ) -> None:
        self.replicas = replicas
        self.model, self.max_norm, self.rho = model, max_norm, rho
        self.params = list(model.parameters())
        self.momenta: list[Tensor] | None = None
        self.loss_of = loss_of or (lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))

    def step(self, window: Sequence[Batch], factor: float | None = None) -> list[float]:
        """One step on the micro-batches of a window; returns their losses at x."""
        factor = 1 / len(window) if factor is None else factor
        x = [p.detach().clone() for p in self.params]
        losses, descent = [], [torch.zeros_like(p) for p in self.params]
        for own in (window[i :: self.replicas] for i in range(self.replicas)):
            at_x, ascent = self._gradient(own, self.replicas * factor)
            losses += at_x
            buffers = [b.clone() for b in self.model.buffers()]
            with torch.no_grad():
                for p, g in zip(self.params, ascent, strict=True):
                    p += self.rho * g
            _, gradient = self._gradient(own, factor)
            descent = [d + g for d, g in zip(descent, gradient, strict=True)]
            with torch.no_grad():
                for tensors, values in ((self.model.buffers(), buffers), (self.params, x)):
                    for t, value in zip(tensors, values, strict=True):
                        t.copy_(value)
        with torch.no_grad():
            norm = torch.stack([g.square().sum() for g in descent]).sum().sqrt()
            scale = 1.0 if self.max_norm is None else min(1.0, self.max_norm / float(norm + 1e-6))
            d = [scale * g + WEIGHT_DECAY * value for g, value in zip(descent, x, strict=True)]
            self.momenta = (
                d
                if self.momenta is None
                else [MOMENTUM * m + each for m, each in zip(self.momenta, d, strict=True)]
            )
            for p, value, m in zip(self.params, x, self.momenta, strict=True):
                p.copy_(value - LR * m)
        return losses

    def _gradient(self, window: Sequence[Batch], factor: float) -> tuple[list[float], list[Tensor]]:
        losses, total = [], [torch.zeros_like(p) for p in self.params]
        for batch in window:
            loss = self.loss_of(self.model, batch)
            gradients = torch.autograd.grad(loss * factor, self.params)
            total = [t + g for t, g in zip(total, gradients, strict=True)]
            losses.append(loss.item())
        return losses, total


class WithModes(ef.USAM):
    """USAM that keeps the calls of `train` and `eval`, as schedule-free optimizers have them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[str] = []

    def train(self) -> None:
        self.calls.append("train")

    def eval(self) -> None:
        self.calls.append("eval")


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Weights and buffers agree to 1e-6, and are not those of `make_model()`."""
    states = model.state_dict(), other.state_dict()
    for name, t in states[0].items():
        torch.testing.assert_close(t, states[1][name], rtol=0, atol=1e-6)
    start = make_model().state_dict()
    assert any((start[name] - t).abs().max() > 1e-3 for name, t in states[0].items())


class MeanLoss(nn.Module):
    """A loss with a moving average of itself and the number of its calls in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(y_pred, y)
        if torch.is_grad_enabled():
            self.mean.lerp_(loss.detach().double(), 0.5)
            self.calls += 1
        return loss

    def assert_saw(self, losses: Sequence[float]) -> None:
        """Assert that the buffers are those of these losses."""
        mean = 0.0
        for loss in losses:
            mean += 0.5 * (loss - mean)
        assert self.calls == len(losses)
        torch.testing.assert_close(float(self.mean), mean, rtol=0, atol=1e-6)
