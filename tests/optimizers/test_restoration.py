"""x comes back bit for bit, from anywhere and after anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, bits, same_bits
from eigenfilter import _perturbation
from optimizers.problems import closure_of, distance, parameters, snapshot

SPECIAL = (torch.inf, -torch.inf, torch.nan, -0.0, 1e-310, 65504.0)


def with_special_values(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The problem's parameters with a few that no arithmetic would bring back."""
    params = parameters(dtype)
    with torch.no_grad():
        params[-1][: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
        bits(params[-1])[2] |= 5  # a payload of its own
    return params


def usam(params: list[torch.nn.Parameter]) -> ef.USAM:
    return ef.USAM(params, lr=0.1, momentum=0.9, weight_decay=0.01, rho=RHO)


def ones_as_gradients(params: list[torch.nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_step_of_length_zero_returns_to_x(dtype: torch.dtype, lr: float | Tensor) -> None:
    params = parameters(dtype)
    before = snapshot(params)
    opt = ef.USAM(params, lr=lr, momentum=0.9, rho=RHO)
    closure = closure_of(opt, params)
    for _ in range(3):
        opt.step(closure)
    assert closure.calls == 6
    assert all(map(same_bits, params, before))


def test_restore_brings_back_every_bit(dtype: torch.dtype) -> None:
    params = with_special_values(dtype)
    before = snapshot(params)
    opt = usam(params)
    ones_as_gradients(params)
    assert opt.ascend()
    assert opt.perturbed
    assert distance(params[:-1], before[:-1]) > 0.1
    opt.restore()
    assert all(map(same_bits, params, before))
    assert not opt.perturbed
    assert opt.phase == "ascent"


def test_restore_without_an_ascent_changes_nothing() -> None:
    params = parameters()
    before = snapshot(params)
    opt = usam(params)
    opt.restore()
    closure_of(opt, params)()
    opt.restore()
    assert all(map(same_bits, params, before))
    assert all(p.grad is not None for p in params)


def test_after_restore_a_step_is_as_if_nothing_had_been() -> None:
    results = []
    for interrupted in (False, True):
        params = parameters()
        opt = usam(params)
        closure = closure_of(opt, params)
        opt.step(closure)
        if interrupted:
            closure()
            opt.ascend()
            opt.restore()
        opt.step(closure)
        results.append(params)
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_closure_that_raises(error: type[BaseException], failing: int) -> None:
    params = parameters()
    opt = usam(params)
    closure = closure_of(opt, params)
    opt.step(closure)
    before, momenta = snapshot(params), snapshot([opt.state[p]["momentum_buffer"] for p in params])
    calls = 0

    def interrupted() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            assert opt.perturbed == (failing == 2)
            raise error("from the closure")
        return closure()

    with pytest.raises(error, match="from the closure"):
        opt.step(interrupted)
    assert not opt.perturbed
    assert _perturbation.holder(params) is None
    assert all(map(same_bits, params, before))
    after = [opt.state[p]["momentum_buffer"] for p in params]
    assert all(map(same_bits, after, momenta))
    opt.step(closure)
    assert distance(params, before) > 1e-3


def test_an_error_in_the_second_group_restores_the_first() -> None:
    """A sparse gradient is found when the kernel of its group is called."""
    first = torch.nn.Parameter(torch.ones(4))
    table = torch.nn.Embedding(5, 3, sparse=True)
    before = snapshot([first, table.weight])
    opt = ef.USAM([{"params": [first]}, {"params": table.parameters()}], lr=0.1, rho=RHO)
    loss = (first * first).sum() + table(torch.tensor([1])).sum()
    loss.backward()
    with pytest.raises(TypeError, match="is sparse"):
        opt.ascend()
    assert not opt.perturbed
    assert all(map(same_bits, [first, table.weight], before))


def test_others_can_ask_whether_parameters_are_perturbed() -> None:
    params, other = parameters(), parameters()
    opt = usam(params)
    closure_of(opt, params)()
    assert _perturbation.holder(params) is None
    opt.ascend()
    assert _perturbation.holder(params[:1]) is opt
    assert _perturbation.holder(other) is None
    closure_of(opt, params)()
    opt.step()
    assert _perturbation.holder(params) is None
