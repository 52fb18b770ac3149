"""Gradients that were there before ascend() or step() in the explicit form."""

from __future__ import annotations

import pytest
import torch

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.accumulation import CLEARING, MAKERS, adding
from optimizers.problems import Exact, closure_of, distance, loss_of, parameters, snapshot


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


@pytest.mark.parametrize("how", CLEARING)
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


def test_gradients_that_are_overwritten_in_the_explicit_form() -> None:
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO, set_to_none=False), Exact(params, {"lr": 0.1})
    for p in params:
        p.grad = torch.zeros_like(p)

    def overwrite() -> None:
        for p, g in zip(params, torch.autograd.grad(loss_of(params), params), strict=True):
            p.grad.copy_(g)

    for _ in range(3):
        overwrite()
        while opt.ascend():
            overwrite()
        opt.step()
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_a_gradient_from_an_abandoned_ascent_is_not_one_at_x() -> None:
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    closure = closure_of(opt, params)
    closure()
    opt.ascend()
    closure()
    opt.restore()
    with pytest.raises(RuntimeError, match="those that the last step used"):
        opt.ascend()
    opt.step(adding(opt, params))
    exact.step()
    assert distance(params, exact.x) < 1e-14


# Closures that end a step.


@pytest.mark.parametrize("name", MAKERS)
def test_a_closure_that_does_nothing_ends_an_explicit_step(name: str) -> None:
    """Lightning's manual optimization always passes such a closure."""
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


def test_a_closure_that_adds_the_last_micro_batch_ends_an_explicit_step() -> None:
    """Gradients at one point may be accumulated, as in torch."""
    params = parameters()
    opt, exact = ef.USAM(params, lr=0.1, rho=RHO), Exact(params, {"lr": 0.1})
    for _ in range(2):
        opt.zero_grad()
        loss_of(params).backward()
        opt.ascend()
        (0.25 * loss_of(params)).backward()
        opt.step(lambda: (0.75 * loss_of(params)).backward())
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_groups_without_a_radius_alone_have_gradients() -> None:
    """A step that is not taken leaves nothing behind for the next."""
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:], "rho": 0.0}]
    opt = ef.USAM(groups, lr=0.1, rho=RHO)
    loss_of(params).backward()
    for p in params[:3]:
        p.grad = None
    assert opt.ascend() is False
    assert opt.phase == "descent"
    opt.clip_grad_norm_(1e9)
    closure_of(opt, params)()
    assert opt.ascend() is True
    opt.restore()
