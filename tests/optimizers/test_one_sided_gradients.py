"""Hessian USAM where a parameter has a gradient at some of its points only: it is zero elsewhere.

The twin of each case is the same closure that leaves zeros in place of nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import METHODS, backward, distance, loss_of, parameters, snapshot
from optimizers.test_missing_gradients import SCHEDULES

LR = 0.1
FIRST, SECOND, ALL = [0, 1, 5], [1, 2, 3], [0, 1, 2, 3, 4, 5]


def sgd(params: Any, method: str, **settings: Any) -> Any:
    return METHODS[method].make(params, lr=LR, momentum=0.9, weight_decay=0.03, **settings)


def adamw(params: Any, method: str, **settings: Any) -> Any:
    m = METHODS[method]
    return ef.AdamW(params, lr=LR, method=m.name, rho=RHO, **m.options, **settings)


def wrapper(params: Any, method: str, **settings: Any) -> Any:
    m = METHODS[method]
    base = torch.optim.SGD(params, lr=LR, momentum=0.9)
    return ef.SharpnessAware(base, m.name, RHO, **m.options, **settings)


def take_steps(
    make: Callable[..., Any],
    method: str,
    present: Sequence[Sequence[int]],
    *,
    explicit: bool,
    grouped: bool = False,
    steps: int = 2,
    **settings: Any,
) -> list[nn.Parameter]:
    """The parameters after steps of which the descents leave alone what is not in present[-1]."""
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:]}] if grouped else params
    opt = make(groups, method, **settings)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        at = calls % METHODS[method].calls
        calls += 1
        opt.zero_grad()
        loss = loss_of(params)
        backward(opt, loss)
        for i, p in enumerate(params):
            if i not in present[at]:
                ascent = at < METHODS[method].calls - 1
                p.grad = torch.zeros_like(p) if explicit and ascent else None
        return loss

    for _ in range(steps):
        opt.step(closure)
        assert not opt.perturbed
    return params


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", [sgd, adamw, wrapper])
@pytest.mark.parametrize("method", ["difference", "product"])
def test_no_gradient_is_bitwise_a_gradient_of_zero(
    method: str, make: Callable[..., Any], schedule: str, grouped: bool
) -> None:
    present = SCHEDULES[schedule][: METHODS[method].calls]
    for settings in ({}, {"skip_nonfinite": True}):
        twins = [
            take_steps(make, method, present, explicit=explicit, grouped=grouped, **settings)
            for explicit in (False, True)
        ]
        assert all(map(same_bits, *twins))
    assert distance(twins[0], parameters()) > 1e-3 or not present[-1]


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@pytest.mark.parametrize("sides", [(FIRST, ALL), (ALL, SECOND), (FIRST, SECOND), (ALL, [])])
def test_the_step_is_the_methods_own(sides: tuple[list[int], list[int]], backend_name: str) -> None:
    """Against the definition in float64; what divides by eps magnifies rounding."""
    params = parameters()

    def gradient(points: Sequence[Tensor], present: Sequence[int]) -> list[Tensor]:
        points = [p.detach().requires_grad_() for p in points]
        grads = torch.autograd.grad(loss_of(points), points)
        return [g if i in present else torch.zeros_like(g) for i, g in enumerate(grads)]

    x = snapshot(params)
    g = gradient(x, sides[0])
    lengths = [float(torch.cat([t.flatten() for t in ts]).norm()) for ts in (x, g)]
    eps = 1e-3 * (1 + lengths[0]) / lengths[1]
    y = [p + eps * a for p, a in zip(x, g, strict=True)]
    h = [(b - a) / eps for a, b in zip(g, gradient(y, sides[1]), strict=True)]
    d = gradient([p + RHO * a for p, a in zip(x, h, strict=True)], ALL)
    expected = [p - LR * a for p, a in zip(x, d, strict=True)]

    opt = ef.HessianUSAM(params, lr=LR, rho=RHO, fd_step=1e-3, backend=backend_name)
    calls = iter((*sides, ALL))

    def closure() -> None:
        opt.zero_grad()
        loss_of(params).backward()
        present = next(calls)
        for i, p in enumerate(params):
            p.grad = p.grad if i in present else None

    opt.step(closure)
    assert distance(params, expected) < 1e-10


class Switched(nn.Module):
    """A sum of layers of which each call skips some, by a branch or by freezing them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.way = way

    def forward(self, x: Tensor, on: Sequence[int]) -> Tensor:
        total = x.sum(-1, keepdim=True).expand(-1, 4)
        for i, layer in enumerate(self.layers):
            if self.way == "frozen":
                layer.requires_grad_(i in on)
            if self.way == "branch" and i not in on:
                continue
            out = layer(x)
            if self.way == "zeros" and i not in on:
                out = 0.0 * out
            total = total + out
        return total.tanh()


@pytest.mark.parametrize("sides", [([0, 1], [0, 1, 2]), ([0, 1, 2], [0, 2]), ([0, 1], [1, 2])])
def test_a_layer_that_a_call_skips(sides: tuple[list[int], list[int]]) -> None:
    """The loss jumps too, and the warning is that of a model that returns zeros."""
    results, messages = [], []
    for way in ("branch", "zeros"):
        torch.manual_seed(3)
        model, x = Switched(way), torch.randn(6, 4, dtype=torch.float64)
        opt = ef.HessianUSAM(model.parameters(), lr=LR, rho=1e-9)
        calls = iter((*sides, [0, 1, 2]))

        def closure(model: Any = model, x: Any = x, opt: Any = opt, calls: Any = calls) -> Tensor:
            opt.zero_grad()
            loss: Tensor = model(x, next(calls)).square().mean()
            loss.backward()
            return loss

        with pytest.warns(UserWarning, match="an implausible finite difference") as caught:
            opt.step(closure)
        messages.append([str(w.message) for w in caught])
        results.append(list(model.parameters()))
    assert all(map(same_bits, *results))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("sides", [([0, 1], [0, 1, 2]), ([0, 1, 2], [0, 2]), ([0, 1], [1, 2])])
def test_a_layer_that_a_call_freezes(sides: tuple[list[int], list[int]]) -> None:
    """What requires no gradient at x does not count in the length of x."""
    torch.manual_seed(3)
    model, x = Switched("frozen"), torch.randn(6, 4, dtype=torch.float64)
    params = list(model.parameters())
    opt = ef.HessianUSAM(params, lr=LR, rho=1e-2, fd_step=1e-2)

    def gradient(points: Sequence[Tensor], on: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(params, points, strict=True):
                p.copy_(value)
        model.zero_grad()
        model(x, on).square().mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    at_x = snapshot(params)
    g = gradient(at_x, sides[0])
    trained = [p for i, p in enumerate(at_x) if i // 2 in sides[0]]
    lengths = [float(torch.cat([t.flatten() for t in ts]).norm()) for ts in (trained, g)]
    eps = 1e-2 * (1 + lengths[0]) / lengths[1]
    y = [p + eps * a for p, a in zip(at_x, g, strict=True)]
    h = [(b - a) / eps for a, b in zip(g, gradient(y, sides[1]), strict=True)]
    d = gradient([p + 1e-2 * a for p, a in zip(at_x, h, strict=True)], [0, 1, 2])
    expected = [p - LR * a for p, a in zip(at_x, d, strict=True)]
    gradient(at_x, [0, 1, 2])

    calls = iter((*sides, [0, 1, 2]))

    def closure() -> None:
        opt.zero_grad()
        model(x, next(calls)).square().mean().backward()

    opt.step(closure)
    assert distance(params, expected) < 1e-13


@pytest.mark.parametrize("side", [0, 1])
def test_gradients_of_a_wider_dtype_on_one_side(side: int) -> None:
    """A gradient of zero has every dtype."""
    results = []
    for explicit in (False, True):
        params = parameters(torch.bfloat16)
        for p in params[3:]:
            p.grad_dtype = torch.float32
        opt = ef.HessianUSAM(params, lr=LR, rho=RHO)
        calls = 0

        def closure(params: Any = params, opt: Any = opt, explicit: bool = explicit) -> None:
            nonlocal calls
            opt.zero_grad()
            loss_of(params).backward()
            if calls == side:
                for p in (params[1], params[3], params[5]):
                    p.grad = torch.zeros_like(p.grad) if explicit else None
            calls += 1

        opt.step(closure)
        results.append(params)
    assert all(map(same_bits, *results))


def test_what_never_has_a_gradient_takes_no_memory() -> None:
    """A layer that is not used counts in the length of x, a frozen one does not."""
    params = parameters()
    frozen = nn.Parameter(torch.ones(7, dtype=torch.float64), requires_grad=False)
    unused = nn.Parameter(torch.full((5,), -0.5, dtype=torch.float64))
    opt = ef.HessianUSAM([*params, frozen, unused], lr=LR, rho=RHO)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
    plain = parameters()
    other = ef.HessianUSAM(plain, lr=LR, rho=RHO)

    def same() -> Tensor:
        other.zero_grad()
        loss = loss_of(plain)
        loss.backward()
        return loss

    other.step(same)
    assert distance(params, plain) < 1e-6  # eps differs, and with it the gradients' rounding
    assert frozen.tolist() == [1.0] * 7
    assert unused.tolist() == [-0.5] * 5
    saved = {p for _, p in opt._buckets.store._auxiliary}
    assert saved == set(params)


def test_a_step_that_was_skipped_leaves_all_as_it_was() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=LR, rho=RHO, skip_nonfinite=True)
    before = snapshot(params)
    calls = 0

    def closure() -> None:
        nonlocal calls
        opt.zero_grad()
        loss_of(params).backward()
        params[3].grad = None
        if calls == 1:
            params[1].grad.fill_(torch.inf)
            params[3].grad = torch.ones_like(params[3])
        calls += 1

    opt.step(closure)
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))
