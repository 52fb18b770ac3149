"""Calls at the wrong time raise an error that says what to do instead, and change nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import closure_of, parameters, snapshot


def usam(**changes: object) -> tuple[ef.USAM, list[torch.nn.Parameter]]:
    params = parameters()
    return ef.USAM(params, **{"lr": 0.1, "momentum": 0.9, "rho": RHO} | changes), params


def test_step_before_its_ascent() -> None:
    opt, params = usam()
    before = snapshot(params)
    closure_of(opt, params)()
    message = r"needs 1 ascents before it, and 0 were taken\. .*while opt\.ascend\(\): closure\(\)"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert all(map(same_bits, params, before))


def test_a_whole_step_within_a_step() -> None:
    params = parameters()
    opt = ef.TwoStepUSAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)
    closure()
    opt.ascend()
    updated = snapshot(params)
    message = r"one is under way that has ascents left: .*end it with step\(\), or .*restore"
    with pytest.raises(RuntimeError, match=message):
        opt.step(closure)
    assert all(map(same_bits, params, updated))
    assert opt.perturbed
    assert closure.calls == 1


MID_STEP: dict[str, Callable[[ef.USAM], object]] = {
    "state_dict": lambda opt: opt.state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group": lambda opt: opt.add_param_group({"params": [torch.ones(2)]}),
    "copying": copy.deepcopy,
    "pickling": pickle.dumps,
}


@pytest.mark.parametrize("name", MID_STEP)
def test_refused_while_the_parameters_are_perturbed(name: str) -> None:
    opt, params = usam()
    closure_of(opt, params)()
    opt.ascend()
    updated, groups = snapshot(params), len(opt.param_groups)
    message = rf"{name}.* while the parameters are perturbed: first end the step with step"
    with pytest.raises(RuntimeError, match=message):
        MID_STEP[name](opt)
    assert all(map(same_bits, params, updated))
    assert len(opt.param_groups) == groups
    opt.restore()
    assert opt.state_dict()["param_groups"][0]["rho"] == RHO


CHANGES: dict[str, Callable[[ef.USAM, list], object]] = {
    "state": lambda opt, params: opt.state[params[0]].update(momentum_buffer=torch.ones(())),
    "parameters": lambda opt, params: opt.param_groups[0]["params"].pop(),
    "groups": lambda opt, params: opt.param_groups.append(dict(opt.param_groups[0], params=[])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_an_ascent_and_its_step(name: str) -> None:
    opt, params = usam()
    closure = closure_of(opt, params)
    opt.step(closure)
    before = snapshot(params)
    closure()
    opt.ascend()
    CHANGES[name](opt, params)
    closure()
    with pytest.raises(RuntimeError, match="changed between an ascent and its step: change"):
        opt.step()
    opt.restore()
    assert all(map(same_bits, params, before))


def test_clipping_an_ascents_gradient() -> None:
    opt, params = usam()
    closure = closure_of(opt, params)
    closure()
    grads = snapshot([p.grad for p in params])
    with pytest.raises(RuntimeError, match="clips the descent gradient: call it after the"):
        opt.clip_grad_norm_(1e-3)
    assert all(map(same_bits, [p.grad for p in params], grads))


@pytest.mark.parametrize("what", ["step", "ascend", "restore"])
def test_a_closure_that_steps_is_told(what: str) -> None:
    opt, params = usam()
    closure = closure_of(opt, params)
    before = snapshot(params)

    def stepping() -> object:
        loss = closure()
        if opt.perturbed:
            getattr(opt, what)()
        return loss

    with pytest.raises(RuntimeError, match=rf"{what}\(\) was called by the closure that step"):
        opt.step(stepping)
    assert not opt.perturbed
    assert all(map(same_bits, params, before))
