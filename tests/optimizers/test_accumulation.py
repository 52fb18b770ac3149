"""Gradients that were there before a step: a step is the method's own, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import (
    METHODS,
    Exact,
    backward,
    closure_of,
    distance,
    loss_of,
    parameters,
    snapshot,
)

NOT_CLEARED = "gradients that were there before the closure are still part of those it left"
LEFT = "the closure left the gradients that were there before it as they are"


def adamw(params: Any) -> Any:
    return ef.AdamW(params, lr=0.1, rho=RHO)


def wrapped(params: Any) -> Any:
    return ef.SharpnessAware(torch.optim.SGD(params, lr=0.1), "two_step_usam", RHO)


MAKERS: dict[str, Callable[[Any], Any]] = {
    **{name: (lambda params, m=m: m.make(params, lr=0.1)) for name, m in METHODS.items()},
    "adamw": adamw,
    "wrapper": wrapped,
}


def adding(opt: Any, params: list[nn.Parameter]) -> Callable[[], Tensor]:
    """A closure that adds its gradient to what is there."""

    def closure() -> Tensor:
        loss = loss_of(params)
        backward(opt, loss)
        return loss

    return closure


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


def none(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None


def in_place(params: list[nn.Parameter]) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.zero_()


def through_data(params: list[nn.Parameter]) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.data.zero_()


CLEARING = {"None": none, "in place": in_place, "through .data": through_data}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("how", CLEARING)
@pytest.mark.parametrize("name", ["usam", "anchored", "product"])
def test_a_closure_that_clears_may_find_any_gradient(name: str, how: str, used: bool) -> None:
    params = parameters()
    opt, exact = METHODS[name].make(params, lr=0.1), Exact(params, {"lr": 0.1}, RHO, name)
    add = adding(opt, params)

    def closure() -> Tensor:
        CLEARING[how](params)
        return add()

    for _ in range(3):
        if not used:
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


# The explicit form.


@pytest.mark.parametrize("name", MAKERS)
def test_ascending_twice_with_the_same_gradient(name: str) -> None:
    """The gradient that the last step used is not the one at the present point."""
    params = parameters()
    opt = MAKERS[name](params)
    opt.step(closure_of(opt, params))
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="those that the last step used: clear them"):
        opt.ascend()
    assert all(map(same_bits, params, before))
    assert not opt.perturbed


def test_ascending_with_gradients_added_to_those_of_the_last_step() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    opt.step(closure_of(opt, params))
    loss_of(params).backward()
    with pytest.raises(RuntimeError, match="those that the last step used, with new ones added"):
        opt.ascend()
    assert not opt.perturbed


@pytest.mark.parametrize("how", ["None", "in place"])
def test_the_explicit_form_clears_as_it_likes(how: str) -> None:
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    add = adding(opt, params)
    for _ in range(3):
        CLEARING[how](params)
        add()
        while opt.ascend():
            add()
        opt.step()
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_cleared_in_place_and_not_reached() -> None:
    """A first parameter without a new gradient: its zeros are not taken for an old one."""
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    opt.step(closure_of(opt, params))
    in_place(params)
    (params[1] ** 2).sum().backward()
    assert opt.ascend()


# Closures that end a step.


@pytest.mark.parametrize("name", MAKERS)
def test_a_closure_that_does_nothing_ends_an_explicit_step(name: str) -> None:
    """As Lightning's manual optimization always passes one."""
    params, others = parameters(), parameters()
    opt, other = MAKERS[name](params), MAKERS[name](others)
    calls = []
    for _ in range(3):
        for each, own in ((opt, params), (other, others)):
            closure = closure_of(each, own)
            with each.evaluation():
                closure()
            while each.ascend():
                with each.evaluation():
                    closure()
            each.step(lambda: calls.append(1)) if each is opt else each.step()
    assert len(calls) == 3
    assert all(map(same_bits, params, others))
    assert not opt.perturbed


def test_a_closure_that_evaluates_ends_an_explicit_step() -> None:
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    closure = closure_of(opt, params)
    for _ in range(3):
        closure()
        opt.ascend()
        opt.step(closure)
        exact.step()
    assert closure.calls == 6
    assert distance(params, exact.x) < 1e-14


def test_a_closure_that_adds_to_the_descents_gradient() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    before = snapshot(params)
    closure = closure_of(opt, params)
    closure()
    opt.ascend()
    closure()
    with pytest.raises(RuntimeError, match=NOT_CLEARED):
        opt.step(adding(opt, params))
    assert not opt.perturbed
    assert all(map(same_bits, params, before))
