"""The two ways to step: what is due when, and how often the closure is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import Exact, closure_of, distance, parameters, snapshot


def test_phases_of_an_explicit_step() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)
    for _ in range(2):
        assert (opt.phase, opt.perturbed) == ("ascent", False)
        closure()
        assert (opt.phase, opt.perturbed) == ("ascent", False)
        assert opt.ascend() is True
        assert (opt.phase, opt.perturbed) == ("descent", True)
        closure()
        updated = snapshot(params)
        assert opt.ascend() is False
        assert all(map(same_bits, params, updated))
        assert (opt.phase, opt.perturbed) == ("descent", True)
        assert opt.step() is None
    assert (opt.phase, opt.perturbed) == ("ascent", False)


def test_the_closure_sees_the_phase_it_is_called_for() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)
    phases = []

    def observed() -> Tensor:
        phases.append((opt.phase, opt.perturbed))
        return closure()

    opt.step(observed)
    assert phases == [("ascent", False), ("descent", True)]


@pytest.mark.parametrize("value", [0.25, None, (1, 2), torch.tensor(3.0)], ids=repr)
def test_whatever_the_closure_returns_is_returned(value: object) -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)

    def returning() -> object:
        closure()
        return value

    assert opt.step(returning) is value


def test_the_closure_runs_with_grad_even_where_the_step_does_not() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    before = snapshot(params)
    with torch.no_grad():
        opt.step(closure_of(opt, params))
    assert distance(params, before) > 1e-2
    assert torch.is_grad_enabled()


def test_gradients_are_cleared_after_an_ascent_and_kept_after_a_step() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)
    closure()
    opt.ascend()
    assert all(p.grad is None for p in params)
    closure()
    grads = [p.grad for p in params]
    values = snapshot(grads)
    opt.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(map(same_bits, grads, values))


def test_gradients_may_be_zeroed_in_place() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    exact = Exact(params, {"lr": 0.1})
    closure = closure_of(opt, params)

    def accumulating() -> Tensor:
        for p in params:
            if p.grad is not None:
                p.grad.zero_()
        loss = closure()
        opt.zero_grad(set_to_none=False)
        closure()
        return loss

    for _ in range(3):
        opt.step(accumulating)
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_gradients_accumulate_over_micro_batches_in_each_phase() -> None:
    params, whole = parameters(), parameters()
    opt, other = (ef.USAM(p, lr=0.1, momentum=0.8, rho=RHO) for p in (params, whole))
    evaluate = closure_of(other, whole)

    def accumulate() -> None:
        opt.zero_grad()
        for share in (0.25, 0.75):
            loss = sum((q * q).sum() for q in params) * share
            loss.backward()

    def at_once() -> Tensor:
        evaluate()
        other.zero_grad()
        loss = sum((q * q).sum() for q in whole)
        loss.backward()
        return loss

    for _ in range(3):
        accumulate()
        while opt.ascend():
            accumulate()
        opt.step()
        other.step(at_once)
    assert distance(params, whole) < 1e-14


def test_step_hooks_run_once_a_step() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    events: list[str] = []
    opt.register_step_pre_hook(lambda *_: events.append("before"))
    opt.register_step_post_hook(lambda *_: events.append("after"))
    closure = closure_of(opt, params)
    opt.step(closure)
    assert events == ["before", "after"]
    closure()
    opt.ascend()
    closure()
    opt.step()
    assert events == ["before", "after"] * 2
