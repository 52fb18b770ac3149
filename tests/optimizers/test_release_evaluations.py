"""release_gradients: what an evaluation releases, and what happens to other gradients."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from eigenfilter.optimizers import in_backward
from optimizers.problems import SETTINGS, backward, closure_of, loss_of, parameters, snapshot

HEAVY = SETTINGS["heavy ball"]


def releasing(params: list[Tensor], **kw: Any) -> ef.USAM:
    return ef.USAM(params, **HEAVY, rho=RHO, release_gradients=True, **kw)


def test_what_backward_makes_elsewhere_is_left_alone() -> None:
    params = parameters()
    opt = releasing(params)
    opt.step(closure_of(opt, params))
    before = snapshot(params)
    loss_of(params).backward()
    assert all(map(same_bits, params, before))
    assert all(p.grad is not None for p in params)


def test_gradients_outside_an_evaluation_are_taken_whole_with_a_warning() -> None:
    params, others = parameters(), parameters()
    opt, other = ef.SGD(params, **HEAVY, release_gradients=True), ef.SGD(others, **HEAVY)
    for warns in (True, False):  # once
        for some in (params, others):
            loss_of(some).backward()
        with pytest.warns(UserWarning, match="inside `with") if warns else nullcontext():
            opt.step()
        other.step()
        opt.zero_grad()
        other.zero_grad()
    assert all(map(same_bits, params, others))


def test_gradients_that_are_left_are_taken_whole() -> None:
    """One parameter has a gradient only from an earlier micro-batch."""
    runs = []
    for release in (False, True):
        params = parameters()
        opt = ef.SGD(params, **HEAVY, release_gradients=release)
        for _ in range(3):
            params[3].square().sum().backward()
            with opt.evaluation():
                (params[0] ** 2 + params[1].sum()).backward()
            opt.step()
            opt.zero_grad()
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))


def test_only_a_group_that_takes_no_ascent_has_gradients() -> None:
    runs = []
    for release in (False, True):
        params = parameters()
        groups = [{"params": params[:2]}, {"params": params[2:], "rho": 0.0}]
        opt = ef.USAM(groups, **HEAVY, rho=RHO, release_gradients=release)

        def closure(opt: ef.USAM = opt, params: list = params) -> Tensor:
            opt.zero_grad()
            loss = params[3].square().sum()
            loss.backward()
            return loss

        opt.step(closure)  # without a warning
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))


def test_an_evaluation_within_an_evaluation() -> None:
    params, others = parameters(), parameters()
    opt = ef.SGD(params, **HEAVY, release_gradients=True)

    def closure() -> Tensor:
        with opt.evaluation():
            loss = loss_of(params)
        loss.backward()
        return loss

    opt.step(closure)
    other = ef.SGD(others, **HEAVY)
    other.step(closure_of(other, others))
    assert all(map(same_bits, params, others))


def test_hooks_are_there_while_they_are_needed() -> None:
    params = parameters()
    opt = releasing(params)
    opt.step(closure_of(opt, params))
    assert not any(p._post_accumulate_grad_hooks for p in params)


def test_earlier_gradients_are_accumulated_outside_the_evaluation() -> None:
    runs = []
    for release in (False, True):
        params = parameters()
        opt = ef.SGD(params, **HEAVY, release_gradients=release)
        for _ in range(3):
            loss_of(params).backward()
            with opt.evaluation():
                (2 * loss_of(params)).backward()
            opt.step()
            opt.zero_grad()
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))


def test_a_second_backward_in_one_evaluation_is_refused() -> None:
    params = parameters()
    opt = ef.SGD(params, **HEAVY, release_gradients=True)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="second gradient"), opt.evaluation():  # noqa: PT012
        loss_of(params).backward()
        with pytest.raises(RuntimeError, match="second gradient"):
            loss_of(params).backward()  # the closure cannot keep the error to itself
    assert all(map(same_bits, params, before))  # all gradients were waiting


def descend(opt: ef.SGD, loss: Tensor) -> None:
    with opt.evaluation():
        loss.backward()


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_second_backward_for_others_is_refused(evaluates: bool) -> None:
    """Its gradient would be taken where others have been updated already."""
    params = parameters()
    opt = ef.SGD(params, **HEAVY, release_gradients=True)
    descend(opt, params[3].square().sum())
    after = snapshot(params)
    loss = (params[4] * params[3].detach().sum()).square().sum()
    if evaluates:
        with pytest.raises(RuntimeError, match="second gradient"):
            descend(opt, loss)
        assert params[4].grad is None
    else:
        loss.backward()
        with pytest.raises(RuntimeError, match="second gradient"):
            opt.step()
    opt.restore()
    assert all(map(same_bits, params, after))
    opt.zero_grad()
    descend(opt, loss_of(params))
    opt.step()


def test_a_closure_that_does_nothing_ends_a_released_step() -> None:
    params, others = parameters(), parameters()
    opt, other = releasing(params), ef.USAM(others, **HEAVY, rho=RHO)
    for _ in range(2):
        with opt.evaluation():
            loss_of(params).backward()
        while opt.ascend():
            with opt.evaluation():
                loss_of(params).backward()
        opt.step(lambda: torch.zeros(()))
        other.step(closure_of(other, others))
    assert all(map(same_bits, params, others))


def test_clipping_finds_a_gradient_if_the_last_one_is_large() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9000, 32), nn.Linear(32, 8), nn.Linear(8, 1))
    assert model[0].weight.numel() * 4 > in_backward.BATCH_BYTES
    params = list(model.parameters())
    opt = ef.SGD(params, lr=1.0, release_gradients=True)

    def closure() -> Tensor:
        loss = 100 * model(torch.arange(50)).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        return loss

    with pytest.raises(RuntimeError, match="changed after backward, as by clipping"):
        opt.step(closure)


def test_the_smallest_gradient_waits_that_is_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_backward, "BATCH_BYTES", 0)
    sizes = (3, 0, 2, 5, 0, 4)
    params = [nn.Parameter(torch.ones(n)) for n in sizes]
    opt = ef.SGD(params, lr=0.1, release_gradients=True)
    with opt.evaluation():
        sum((p.sum() for p in params), torch.zeros(())).backward()
        assert [len(p) for p in params if p.grad is not None] == [2]
    opt.step()


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_backward_whose_error_the_closure_catches(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_backward, "BATCH_BYTES", 0)
    params = parameters()
    opt = releasing(params)
    before, calls = snapshot(params), 0

    def fail(_: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise ArithmeticError("backward")

    params[0].register_post_accumulate_grad_hook(fail)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(params)
        with suppress(ArithmeticError):
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="whose closure caught the error"):
        opt.step(closure)
    assert not opt.perturbed
    assert fails_at == 2 or all(map(same_bits, params, before))
    assert all(p.grad is None for p in params)


class Fails(torch.autograd.Function):
    """The identity, whose backward raises in the second call."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Fails.calls += 1
        if Fails.calls == 2:
            raise ArithmeticError("backward")
        return g


def test_a_backward_that_fails_leaves_no_parameter_perturbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(in_backward, "BATCH_BYTES", 0)
    torch.manual_seed(0)
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    params = [*first.parameters(), *last.parameters()]
    opt = ef.USAM(params, lr=0.1, rho=0.1, release_gradients=True)
    before = snapshot(params)
    Fails.calls = 0

    def closure() -> Tensor:
        opt.zero_grad()
        loss = last(Fails.apply(first(torch.ones(2, 3)))).square().sum()
        loss.backward()
        return loss

    with pytest.raises(ArithmeticError):
        opt.step(closure)
    assert not opt.perturbed
    assert all(map(same_bits, first.parameters(), before[:2]))  # never reached: at x
    assert not same_bits(last.weight, before[2])  # updated, and stays so
    assert same_bits(last.bias, before[3])  # its gradient is the smallest, and waited
    Fails.calls = 10
    opt.step(closure)


def test_a_graph_for_products_is_no_descent() -> None:
    """The ascent's gradient of exact products stays, graph and all, until it has been used."""
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=0.01, hvp="autograd", release_gradients=True)
    with opt.evaluation():
        backward(opt, loss_of(params))
    assert all(p.grad is not None for p in params)
    assert opt.ascend()
    opt.restore()
