"""No gradient counts as a gradient of zero at every point; no gradient at all is no step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import METHODS, closure_of, distance, loss_of, parameters, snapshot

LR = 0.1


def reference(
    x: Sequence[Tensor], present: Sequence[Sequence[int]], method: str, wrapper: bool = False
) -> list[Tensor]:
    """A step in float64 whose k-th gradient is zero for what is not in present[k]."""

    def gradient(points: Sequence[Tensor], k: int) -> list[Tensor]:
        points = [p.detach().requires_grad_() for p in points]
        grads = torch.autograd.grad(loss_of(points), points)
        return [g if i in present[k] else torch.zeros_like(g) for i, g in enumerate(grads)]

    x = [p.detach().clone() for p in x]
    rho = METHODS[method].rho
    g = gradient(x, 0)
    if method in ("sam", "asam"):
        weights = x if method == "asam" else [torch.ones_like(p) for p in x]
        length = torch.cat([(w * a).flatten() for w, a in zip(weights, g, strict=True)]).norm()
        y = [p + rho * w * w * a / length for p, w, a in zip(x, weights, g, strict=True)]
    else:
        y = [p + rho * a for p, a in zip(x, g, strict=True)]
    if METHODS[method].calls == 3:
        start = y if method == "sequential" else x
        y = [p + rho * a for p, a in zip(start, gradient(y, 1), strict=True)]
    d = gradient(y, METHODS[method].calls - 1)
    return [p - LR * a for p, a in zip(x, d, strict=True)]


SCHEDULES: dict[str, list[list[int]]] = {
    "missing in the second": [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0, 1, 2, 3, 4, 5]],
    "missing in the first": [[3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
    "missing in the third": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [1, 3, 5]],
    "each somewhere": [[0, 1, 5], [1, 2, 3], [0, 2, 4]],
    "none of the first come again": [[0, 1, 5], [2, 3], [0, 5]],
    "none at all in the second": [[0, 1, 2, 3, 4, 5], [], [0, 1, 2, 3, 4, 5]],
}
TAKING_ZEROS = ("usam", "sam", "asam", "sequential", "anchored")


def closure_with(params: list[Any], present: list[list[int]]) -> Callable[[], Tensor]:
    calls = iter(present)

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = loss_of(params)
        loss.backward()
        keep = next(calls)
        for i, p in enumerate(params):
            if i not in keep:
                p.grad = None
        return loss

    return closure


@pytest.mark.parametrize("wrapper", [False, True], ids=["own", "wrapper"])
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", TAKING_ZEROS)
def test_no_gradient_is_a_gradient_of_zero(
    method: str, schedule: str, grouped: bool, wrapper: bool
) -> None:
    params, m = parameters(), METHODS[method]
    groups = [{"params": params[:2]}, {"params": params[2:]}] if grouped else params
    opt = m.make(groups, lr=LR)
    if wrapper:
        opt = ef.SharpnessAware(torch.optim.SGD(groups, lr=LR), m.name, m.rho, **m.options)
    present = SCHEDULES[schedule] if m.calls == 3 else SCHEDULES[schedule][:2]
    expected = reference(params, present, method)
    opt.step(closure_with(params, present))
    assert not opt.perturbed
    assert distance(params, expected) < 1e-14


def test_anchored_by_hand() -> None:
    """a^2 + b^2 at (1, 2), b without a gradient in the second call: the third point has b = 2."""
    a, b = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.0, 2.0))
    opt = ef.TwoStepUSAM([a, b], lr=0.1, rho=0.1, ascent="anchored")
    points: list[float] = []

    def closure() -> None:
        opt.zero_grad()
        points.append(b.item())
        (a * a + (b * b if len(points) != 2 else 0.0)).backward()

    opt.step(closure)
    torch.testing.assert_close(torch.tensor(points), torch.tensor([2.0, 2.4, 2.0]))
    torch.testing.assert_close(b.detach(), torch.tensor(1.6, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_no_gradient_at_all_is_no_step(method: str, form: str) -> None:
    """A batch that was skipped: torch does nothing either."""
    params = parameters()
    opt = METHODS[method].make(params, lr=LR, momentum=0.9)
    opt.step(closure_of(opt, params))
    before = snapshot(params)
    momenta = snapshot([opt.state[p]["momentum_buffer"] for p in params])
    opt.zero_grad()
    if form == "closure":
        assert opt.step(lambda: "skipped") == "skipped"
    else:
        assert opt.ascend() is False
        opt.step()
    assert (opt.phase, opt.perturbed) == ("ascent", False)
    assert all(map(same_bits, params, before))
    now = [opt.state[p]["momentum_buffer"] for p in params]
    assert all(map(same_bits, now, momenta))
    opt.step(closure_of(opt, params))
    assert distance(params, before) > 1e-3


@pytest.mark.parametrize("make", [ef.SGD, ef.AdamW, ef.USAM])
def test_nothing_before_the_first_gradient(make: type) -> None:
    params = parameters()
    opt = make(params, lr=LR)
    opt.step()
    opt.step(lambda: None)
    assert len(opt.state) == 0


@pytest.mark.parametrize("method", ["usam", "sam", "anchored"])
def test_no_gradient_in_the_descent_goes_back_to_x(method: str) -> None:
    params = parameters()
    opt = METHODS[method].make(params, lr=LR)
    before = snapshot(params)
    closure = closure_of(opt, params)
    closure()
    while opt.ascend():
        if opt.phase == "ascent":
            closure()
    opt.step()
    assert not opt.perturbed
    assert all(map(same_bits, params, before))


def test_ascending_without_a_gradient_does_not_count_as_an_ascent() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=LR, rho=RHO)
    assert opt.ascend() is False
    closure_of(opt, params)()
    with pytest.raises(RuntimeError, match="needs 1 ascents before it"):
        opt.step()
