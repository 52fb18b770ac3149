"""Gradients that were there before a step: a step is the method's own, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.accumulation import CLEARING, MAKERS, adding, none
from optimizers.problems import METHODS, Exact, closure_of, distance, loss_of, parameters, snapshot

NOT_CLEARED = "gradients that were there before the closure are still part of those it left"

LEFT = "the closure left the gradients that were there before it as they are"


@pytest.mark.parametrize("name", MAKERS)
def test_a_micro_batch_before_the_step_is_refused(name: str) -> None:
    params = parameters()
    opt = MAKERS[name](params)
    before = snapshot(params)
    loss_of(params).backward()
    with pytest.raises(RuntimeError, match=NOT_CLEARED):
        opt.step(adding(opt, params))
    assert all(map(same_bits, params, before))
    assert not opt.perturbed
    assert not any(opt.state.get(p) for p in params)
    assert all(p.grad is not None for p in params)  # nothing is lost either


def test_two_micro_batches_of_a_linear_model() -> None:
    """Both inside the closure: the exact step. The first before it: an error, and no step."""
    torch.manual_seed(3)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    model = nn.Linear(4, 1).double()
    start = [p.detach().clone() for p in model.parameters()]
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.05)

    def micro(i: int) -> Tensor:
        part = slice(4 * i, 4 * i + 4)
        loss = nn.functional.mse_loss(model(x[part]), y[part]) / 2
        loss.backward()
        return loss.detach()

    micro(0)
    with pytest.raises(RuntimeError, match=NOT_CLEARED):
        opt.step(lambda: micro(1))
    assert all(map(same_bits, model.parameters(), start))

    def whole() -> Tensor:
        opt.zero_grad()
        return micro(0) + micro(1)

    opt.step(whole)
    at = [p.requires_grad_() for p in snapshot(start)]

    def full(points: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(x @ points[0].T + points[1], y)

    g = torch.autograd.grad(full(at), at)
    up = [(p + 0.05 * a).detach().requires_grad_() for p, a in zip(at, g, strict=True)]
    expected = [p - 0.1 * a for p, a in zip(at, torch.autograd.grad(full(up), up), strict=True)]
    assert distance(list(model.parameters()), expected) < 1e-15


@pytest.mark.parametrize("from_last_step", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("how", CLEARING)
@pytest.mark.parametrize("name", ["usam", "anchored", "product"])
def test_a_closure_that_clears_may_find_any_gradient(
    name: str, how: str, from_last_step: bool
) -> None:
    params = parameters()
    opt, exact = METHODS[name].make(params, lr=0.1), Exact(params, {"lr": 0.1}, RHO, name)
    add = adding(opt, params)

    def closure() -> Tensor:
        CLEARING[how](params)
        return add()

    for _ in range(3):
        if not from_last_step:
            (3.0 * loss_of(params)).backward()
        opt.step(closure)
        exact.step()
    assert distance(params, exact.x) < 1e-14


@pytest.mark.parametrize("how", CLEARING)
def test_gradients_cleared_outside_the_closure(how: str) -> None:
    """Zeros that lie there before the closure are nothing to refuse."""
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    for _ in range(3):
        CLEARING[how](params)
        opt.step(adding(opt, params))
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_gradients_of_the_last_step_are_not_added_to() -> None:
    """What the last step used and nobody cleared is dropped, never mixed in."""
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    for _ in range(3):
        opt.step(adding(opt, params))
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_a_micro_batch_on_top_of_the_last_steps_gradients() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    opt.step(closure_of(opt, params))
    before = snapshot(params)
    loss_of(params).backward()
    with pytest.raises(RuntimeError, match=NOT_CLEARED):
        opt.step(adding(opt, params))
    assert all(map(same_bits, params, before))


def test_a_closure_that_clears_a_part_of_the_gradients() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    before = snapshot(params)
    add = adding(opt, params)

    def closure() -> Tensor:
        none(params[:-1])
        return add()

    loss_of(params).backward()
    with pytest.raises(RuntimeError, match=NOT_CLEARED):
        opt.step(closure)
    assert all(map(same_bits, params, before))


def test_a_closure_that_does_not_reach_a_gradient_that_is_there() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    loss_of(params).backward()

    def closure() -> Tensor:
        none(params[:-1])
        loss = (params[1] ** 2).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=NOT_CLEARED):
        opt.step(closure)


def test_a_closure_that_does_nothing_for_a_whole_step() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    before = snapshot(params)
    loss_of(params).backward()
    with pytest.raises(RuntimeError, match=LEFT):
        opt.step(lambda: None)
    assert all(map(same_bits, params, before))


def test_accumulation_inside_the_closure() -> None:
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})

    def closure() -> None:
        opt.zero_grad()
        for share in (0.25, 0.5, 0.25):
            (share * loss_of(params)).backward()

    loss_of(params).backward()
    for _ in range(3):
        opt.step(closure)
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_without_an_ascent_gradients_accumulate_as_in_torch() -> None:
    params, plain = parameters(), parameters()
    for opt, own in (
        (ef.USAM(params, lr=0.1, rho=0.0), params),
        (torch.optim.SGD(plain, lr=0.1), plain),
    ):
        for _ in range(2):
            opt.zero_grad()
            loss_of(own).backward()
            opt.step(adding(opt, own))
    assert distance(params, plain) < 1e-15


def test_a_closure_that_raises_leaves_no_hook_and_no_mark() -> None:
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    loss_of(params).backward()

    def failing() -> Tensor:
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        opt.step(failing)
    assert not any(p._backward_hooks for p in params)
    opt.step(closure_of(opt, params))
    exact.step()
    assert distance(params, exact.x) < 1e-15


# Closures that look odd and are right.


def assigning(opt: Any, params: list[nn.Parameter]) -> Tensor:
    loss = loss_of(params)
    for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = torch.empty_like(p, requires_grad=False).copy_(g)
    return loss


def penalized(opt: Any, params: list[nn.Parameter]) -> Tensor:
    """A gradient taken with the old ones in place, cleared after it."""
    (g,) = torch.autograd.grad(loss_of(params), params[:1], create_graph=True)
    opt.zero_grad()
    loss = loss_of(params) + 0.0 * g.square().sum()
    loss.backward()
    return loss


def cleared_by_the_optimizer(opt: Any, params: list[nn.Parameter]) -> Tensor:
    torch.autograd.grad(loss_of(params), params)
    opt.zero_grad(set_to_none=False)
    loss = loss_of(params)
    loss.backward()
    return loss


@pytest.mark.parametrize("closure", [assigning, penalized, cleared_by_the_optimizer])
def test_closures_that_replace_the_gradients(closure: Callable[..., Tensor]) -> None:
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    for _ in range(2):
        loss_of(params).backward()
        opt.step(lambda: closure(opt, params))
        exact.step()
    assert distance(params, exact.x) < 1e-14
