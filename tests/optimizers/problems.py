"""The problem that the optimizers are tested on, and the exact optimizer in float64.

The problem is smooth, not quadratic, couples its parameters and has a gradient everywhere. Its
parameters are of every kind: no dimension, no element, channels last, a thousand elements.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cases import RHO
from eigenfilter.optimizers.registry import OPTIMIZERS

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


Points = Sequence[Tensor]


@dataclass(frozen=True)
class Method:
    """A way to ascend.

    Attributes:
        name: the registered method.
        calls: gradients a step.
        point: the descent's point of the exact optimizer, from it, x and the gradient at x.
        options: its own arguments, here and there.
        rho: large enough that a run in bfloat16 shows it.
        normalized: whether it takes a norm, which every backend sums in its own order.
    """

    name: str
    calls: int
    point: Callable[[Exact, Points, Points], Points]
    options: Mapping[str, Any] = field(default_factory=dict)
    rho: float = RHO
    normalized: bool = False

    def make(self, params: Any, **settings: Any) -> Any:
        """The optimizer with SGD's descent."""
        return OPTIMIZERS[self.name](params, **{"rho": self.rho} | settings, **self.options)


def _sam(exact: Exact, x: Points, g: Points) -> Points:
    return exact.perturb(x, [a / _norm(g) for a in g])


def _asam(exact: Exact, x: Points, g: Points) -> Points:
    weighted = [b * a for b, a in zip(x, g, strict=True)]
    return exact.perturb(x, [b * a / _norm(weighted) for b, a in zip(x, weighted, strict=True)])


def _sequential(exact: Exact, x: Points, g: Points) -> Points:
    y = exact.perturb(x, g)
    return exact.perturb(y, exact.gradient(y))


def _anchored(exact: Exact, x: Points, g: Points) -> Points:
    return exact.perturb(x, exact.gradient(exact.perturb(x, g)))


def _hessian(exact: Exact, x: Points, g: Points) -> Points:
    return exact.perturb(x, exact.product(x, g))


METHODS = {
    "usam": Method("usam", 2, lambda exact, x, g: exact.perturb(x, g)),
    "sam": Method("sam", 2, _sam, rho=2.0, normalized=True),
    "asam": Method("sam", 2, _asam, {"adaptive": True}, rho=2.0, normalized=True),
    "sequential": Method("two_step_usam", 3, _sequential),
    "anchored": Method("two_step_usam", 3, _anchored, {"ascent": "anchored"}),
    "difference": Method("hessian_usam", 3, _hessian, normalized=True),
    "product": Method("hessian_usam", 2, _hessian, {"hvp": "autograd"}),
}


def parameters(
    dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[torch.nn.Parameter]:
    """The same parameters at each call."""
    params = []
    for i, shape in enumerate(shapes):
        values = torch.linspace(-1.0, 2.0, torch.Size(shape).numel() or 1, dtype=torch.float64)
        t = (values + 0.1 * i)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
        if len(shape) == 4:
            t = t.to(memory_format=torch.channels_last)
        params.append(torch.nn.Parameter(t))
    return params


def loss_of(params: Sequence[Tensor], sign: float = 1.0) -> Tensor:
    """f(x), or -f(x): convex, curvature from 0.7 to 4."""
    flat = torch.cat([p.flatten() for p in params])
    z = _slopes(tuple(p.numel() for p in params), flat.dtype) * flat - 0.7
    total = (0.5 * z * z + 0.3 * z.cos()).sum()
    return sign * (total + 0.1 * params[0].sum() * params[1].sum())


@functools.cache
def _slopes(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A slope for each parameter's elements, the same number in every dtype."""
    return torch.cat([torch.full((n,), 1 + i / 8, dtype=dtype) for i, n in enumerate(sizes)])


def backward(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    """Call backward, with a graph if the optimizer asks for one.

    torch warns that the graph holds itself alive until the gradients are cleared, as ascend() does.
    """
    if not getattr(opt, "needs_graph", False):
        loss.backward()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        loss.backward(create_graph=True)


def closure_of(
    opt: torch.optim.Optimizer,
    params: Sequence[Tensor],
    sign: float = 1.0,
    loss_of: Callable[..., Tensor] = loss_of,
) -> Callable[[], Tensor]:
    """A closure that counts its calls in `closure.calls`."""

    def closure() -> Tensor:
        closure.calls += 1  # type: ignore[attr-defined]
        opt.zero_grad()
        loss = loss_of(params, sign)
        backward(opt, loss)
        return loss

    closure.calls = 0  # type: ignore[attr-defined]
    return closure


def sign_of(settings: dict[str, Any]) -> float:
    """The sign that makes the problem one that the settings minimize."""
    return -1.0 if settings.get("maximize") else 1.0


class Exact:
    """The optimizers in float64, written down from their definitions with autograd alone.

    Args:
        params: where it starts.
        settings: SGD's hyperparameters.
        rho: of each parameter, or of all; parameters with 0.0 take no ascent.
        method: a name in `METHODS`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        settings: dict[str, Any],
        rho: float | Sequence[float] = RHO,
        method: str = "usam",
    ) -> None:
        self.x = [p.detach().double().clone() for p in params]
        self.m: list[Tensor | None] = [None] * len(self.x)
        self.rho = [rho] * len(self.x) if isinstance(rho, float) else list(rho)
        self.settings = settings
        self.method = method

    def objective(self, points: Sequence[Tensor]) -> Tensor:
        """The function to minimize: the problem, or its negative with `maximize`."""
        loss = loss_of(points, sign_of(self.settings))
        return -loss if self.settings.get("maximize") else loss

    def gradient(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of the objective."""
        points = [y.detach().requires_grad_() for y in points]
        return list(torch.autograd.grad(self.objective(points), points))

    def product(self, points: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Hessian of the objective times vectors."""
        points = [y.detach().requires_grad_() for y in points]
        grads = torch.autograd.grad(self.objective(points), points, create_graph=True)
        slope = torch.stack([(g * v).sum() for g, v in zip(grads, vectors, strict=True)]).sum()
        return list(torch.autograd.grad(slope, points))

    def perturb(self, points: Points, along: Points) -> Points:
        """Points, each perturbed by its rho."""
        return [y + rho * g for y, rho, g in zip(points, self.rho, along, strict=True)]

    def descent_point(self) -> Points:
        """The point at which the descent's gradient is taken."""
        x = self.x
        g = [a * (rho > 0) for a, rho in zip(self.gradient(x), self.rho, strict=True)]
        return METHODS[self.method].point(self, x, g)

    def step(self) -> None:
        """Take one step."""
        s, beta = self.settings, self.settings.get("momentum", 0.0)
        for i, g in enumerate(self.gradient(self.descent_point())):
            d = g + s.get("weight_decay", 0.0) * self.x[i]
            m = self.m[i]
            self.m[i] = d if m is None else beta * m + (1 - s.get("dampening", 0.0)) * d
            u = d + beta * self.m[i] if s.get("nesterov") else self.m[i] if beta else d
            self.x[i] = self.x[i] - s["lr"] * u


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm that SAM divides by; what is added to it shows in float64."""
    return torch.cat([t.flatten() for t in tensors]).norm() + 1e-12


def snapshot(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the values."""
    return [t.detach().clone() for t in tensors]


def state_of(opt: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors in the state of these parameters, sorted by name."""
    entries = [sorted(opt.state.get(p, {}).items()) for p in params]
    return snapshot([v for entry in entries for _, v in entry if isinstance(v, Tensor)])


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any elements; the problem's are of size 1."""
    pairs = zip(actual, expected, strict=True)
    differences = [(a.detach().double() - e.detach().double()).abs() for a, e in pairs]
    return max(float(d.max()) for d in differences if d.numel() > 0)
