"""Wrappers that subclass, copy or forward to an optimizer: one step state, one protocol."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import eigenfilter as ef
from cases import same_bits
from optimizers.problems import METHODS, closure_of, parameters, snapshot


class Forwarding:
    """What it lacks it asks of the optimizer, as Fabric's and Lightning's wrappers do."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Forwarding", (Forwarding, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Copying:
    """It begins with the optimizer's `__dict__`, as older wrappers do, and inherits its methods."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = dict(optimizer.__dict__)
        self._optimizer = optimizer
        self.__class__ = type("Copying", (Copying, type(optimizer)), {})


class Plain:
    """It is no optimizer, and forwards everything."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


WRAPPERS = [Forwarding, Copying, Plain]


def wrapped_adam(params: Any) -> Any:
    return ef.SharpnessAware(torch.optim.Adam(params, lr=0.1), "sam", 0.5)


MAKERS: dict[str, Callable[[Any], Any]] = {
    **{
        name: (lambda params, m=m: m.make(params, lr=0.1, momentum=0.8))
        for name, m in METHODS.items()
    },
    "adamw": lambda params: ef.AdamW(params, lr=0.1, rho=0.1),
    "wrapper": wrapped_adam,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", MAKERS)
def test_either_takes_any_part_of_a_step(name: str, wrap: Callable[[Any], Any]) -> None:
    """The wrapper ascends and the optimizer steps, or the other way round: the same bits."""
    params, others = parameters(), parameters()
    raw, other = MAKERS[name](params), MAKERS[name](others)
    proxy = wrap(raw)
    for ascending, stepping in ((proxy, raw), (raw, proxy), (proxy, proxy), (raw, raw)):
        for first, second, own in ((ascending, stepping, params), (other, other, others)):
            closure = closure_of(first, own)
            with first.evaluation():
                closure()
            while first.ascend():
                assert first.perturbed
                assert second.perturbed
                assert first.phase == second.phase
                with second.evaluation():
                    closure()
            second.step()
        assert not raw.perturbed
        assert not proxy.perturbed
        assert all(map(same_bits, params, others))
    for each, own in ((proxy, params), (other, others)):
        each.step(closure_of(each, own))
    assert all(map(same_bits, params, others))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_restoring_through_either(wrap: Callable[[Any], Any]) -> None:
    params = parameters()
    raw = ef.USAM(params, lr=0.1, rho=0.1)
    proxy = wrap(raw)
    before = snapshot(params)
    for ascending, restoring in ((proxy, raw), (raw, proxy)):
        closure_of(raw, params)()
        ascending.ascend()
        restoring.restore()
        assert all(map(same_bits, params, before))
        assert not ascending.perturbed


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_hyperparameters_and_state_loaded_into_either(wrap: Callable[[Any], Any]) -> None:
    """Loading makes new groups and a new state: a wrapper's old ones must not come back."""
    params, others = parameters(), parameters()
    raw, other = (ef.USAM(p, lr=0.1, momentum=0.8, rho=0.1) for p in (params, others))
    proxy = wrap(raw)
    for each, own in ((proxy, params), (other, others)):
        each.step(closure_of(each, own))
    for each in (raw, other):
        state_dict = each.state_dict()
        state_dict["param_groups"][0] |= {"lr": 0.03, "rho": 0.2}
        each.load_state_dict(state_dict)
    for each, own in ((proxy, params), (other, others)):
        each.step(closure_of(each, own))
    state_dict = proxy.state_dict()
    assert state_dict["param_groups"][0]["lr"] == 0.03
    assert all(map(same_bits, params, others))
    proxy.load_state_dict(state_dict)
    for each, own in ((raw, params), (other, others)):
        each.step(closure_of(each, own))
    assert all(map(same_bits, params, others))


@pytest.mark.parametrize("wrap", [Forwarding, Copying])
@pytest.mark.parametrize("clip", [False, True])
def test_a_scaler_steps_through_a_wrapper(wrap: Callable[[Any], Any], clip: bool) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    raw, other = (ef.USAM(p, lr=0.1, rho=0.1) for p in (params, others))
    for opt, own in ((wrap(raw), params), (other, others)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(sum((p * p).sum() for p in own)).backward()
            while opt.ascend(grad_scaler=scaler):
                scaler.scale(sum((p * p).sum() for p in own)).backward()
            if clip:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(own, 1.0)
            scaler.step(opt)
            scaler.update()
    assert all(map(same_bits, params, others))
    assert "found_inf" not in vars(raw)


def test_a_scaler_that_reaches_only_the_wrapper_is_told() -> None:
    params = parameters(torch.float32)
    raw = ef.USAM(params, lr=0.1, rho=0.1)
    proxy = Plain(raw)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    while proxy.ascend(grad_scaler=scaler):
        scaler.scale(sum((p * p).sum() for p in params)).backward()
    with pytest.raises(RuntimeError, match="the ascents and the step must agree on the scaler"):
        scaler.step(proxy)


def test_unscaled_for_one_and_stepped_with_another() -> None:
    params = parameters(torch.float32)
    raw = ef.USAM(params, lr=0.1, rho=0.1)
    proxy = Forwarding(raw)
    before = snapshot(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    while raw.ascend(grad_scaler=scaler):
        scaler.scale(sum((p * p).sum() for p in params)).backward()
    raw.clip_grad_norm_(1.0, scaler)
    with pytest.raises(RuntimeError, match=r"call scaler\.unscale_\(wrapper\) instead"):
        scaler.step(proxy)
    raw.restore()
    assert all(map(same_bits, params, before))


def test_a_copy_outlives_the_optimizer() -> None:
    params, others = parameters(), parameters()
    proxy = Copying(ef.USAM(params, lr=0.1, rho=0.1))
    del proxy._optimizer
    gc.collect()
    other = ef.USAM(others, lr=0.1, rho=0.1)
    for each, own in ((proxy, params), (other, others)):
        each.step(closure_of(each, own))
    assert all(map(same_bits, params, others))
