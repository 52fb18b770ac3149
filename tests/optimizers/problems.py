"""What the optimizers are tried on, and the exact optimizer they are compared to.

The problem is smooth, not quadratic, couples its parameters and has a gradient everywhere. Its
parameters are of every kind: no dimension, no element, channels last, a thousand elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cases import RHO

SHAPES = ((), (3,), (0,), (4, 5), (2, 3, 2, 2), (1000,))

# SGD's hyperparameters; with `maximize` the problem is -f.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.11, "weight_decay": 0.03},
    "heavy ball": {"lr": 0.11, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.03},
    "nesterov": {"lr": 0.07, "momentum": 0.8, "nesterov": True, "weight_decay": 0.03},
    "maximize": {"lr": 0.11, "momentum": 0.7, "dampening": 0.1, "maximize": True},
    "maximize nesterov": {
        "lr": 0.07,
        "momentum": 0.7,
        "nesterov": True,
        "weight_decay": 0.03,
        "maximize": True,
    },
}


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    """The same parameters at each call."""
    made = []
    for i, shape in enumerate(SHAPES):
        values = torch.linspace(-1.0, 2.0, torch.Size(shape).numel() or 1, dtype=torch.float64)
        t = (values + 0.1 * i)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
        if len(shape) == 4:
            t = t.to(memory_format=torch.channels_last)
        made.append(torch.nn.Parameter(t))
    return made


def loss_of(params: Sequence[Tensor], sign: float = 1.0) -> Tensor:
    """f(x), or -f(x): convex, curvature from 0.7 to 4."""
    total = torch.zeros((), dtype=params[0].dtype)
    for i, p in enumerate(params):
        z = (1.0 + 0.1 * i) * p - 0.7
        total = total + (0.5 * z * z + 0.3 * z.cos()).sum()
    first, second = params[0], params[1].sum()
    return sign * (total + 0.1 * first * second)


def closure_of(
    opt: torch.optim.Optimizer, params: Sequence[Tensor], sign: float = 1.0
) -> Callable[[], Tensor]:
    """A closure that counts its calls in `closure.calls`."""

    def closure() -> Tensor:
        closure.calls += 1  # type: ignore[attr-defined]
        opt.zero_grad()
        loss = loss_of(params, sign)
        loss.backward()
        return loss

    closure.calls = 0  # type: ignore[attr-defined]
    return closure


def sign_of(settings: dict[str, Any]) -> float:
    """The sign that makes the problem one that the settings solve."""
    return -1.0 if settings.get("maximize") else 1.0


class ExactUSAM:
    """USAM in float64, written down from its definition; with rho = 0 SGD.

    Args:
        params: where it starts.
        settings: SGD's hyperparameters.
        rho: of each parameter, or of all.
    """

    def __init__(
        self, params: Sequence[Tensor], settings: dict[str, Any], rho: float | Sequence[float] = RHO
    ) -> None:
        self.x = [p.detach().double().clone() for p in params]
        self.m: list[Tensor | None] = [None] * len(self.x)
        self.rho = [rho] * len(self.x) if isinstance(rho, float) else list(rho)
        self.settings = settings

    def gradient(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of what is minimised."""
        points = [y.detach().requires_grad_() for y in points]
        grads = torch.autograd.grad(loss_of(points, sign_of(self.settings)), points)
        return [-g for g in grads] if self.settings.get("maximize") else list(grads)

    def step(self) -> None:
        """Take one step."""
        s, beta = self.settings, self.settings.get("momentum", 0.0)
        ascents = self.gradient(self.x)
        y = [x + rho * g for x, rho, g in zip(self.x, self.rho, ascents, strict=True)]
        for i, g in enumerate(self.gradient(y)):
            d = g + s.get("weight_decay", 0.0) * self.x[i]
            m = self.m[i]
            self.m[i] = d if m is None else beta * m + (1 - s.get("dampening", 0.0)) * d
            u = d + beta * self.m[i] if s.get("nesterov") else self.m[i] if beta else d
            self.x[i] = self.x[i] - s["lr"] * u


def snapshot(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the values."""
    return [t.detach().clone() for t in tensors]


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any elements; the problem's are of size 1."""
    pairs = zip(actual, expected, strict=True)
    differences = [(a.detach().double() - e.detach().double()).abs() for a, e in pairs]
    return max(float(d.max()) for d in differences if d.numel() > 0)
