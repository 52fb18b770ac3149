"""SharpnessAware: what it shares with its base, its arguments, and bases that fail.

That it steps, skips, saves and copies as every optimizer does is tested in `test_conformance.py`
and `test_conformance_state.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef
from cases import RHO, same_bits
from eigenfilter import _perturbation
from optimizers.problems import (
    METHODS,
    SETTINGS,
    Exact,
    closure_of,
    distance,
    parameters,
    sign_of,
    snapshot,
)


class Plain(torch.optim.Optimizer):
    """An optimizer of a third party: of SGD's hyperparameters it has only lr."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.fails = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self.fails:
            raise ArithmeticError("from the base")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_around_sgd_it_is_the_methods_optimizer(method: str, settings: dict[str, Any]) -> None:
    m = METHODS[method]
    params = parameters()
    base = torch.optim.SGD(params, **settings)
    opt = ef.SharpnessAware(base, m.name, RHO, **m.options)
    closure = closure_of(opt, params, sign_of(settings))
    exact = Exact(params, settings, RHO, method)
    for _ in range(6):
        opt.step(closure)
        exact.step()
    assert closure.calls == 6 * m.calls
    assert distance(params, exact.x) < (1e-7 if method == "difference" else 1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_around_an_optimizer_that_knows_lr_alone(method: str) -> None:
    """Its groups have no `maximize`, for example."""
    m = METHODS[method]
    params = parameters()
    opt = ef.SharpnessAware(Plain(params, lr=0.1), m.name, RHO, **m.options)
    exact = Exact(params, {"lr": 0.1}, RHO, method)
    for _ in range(3):
        opt.step(closure_of(opt, params))
        exact.step()
    assert distance(params, exact.x) < (1e-7 if method == "difference" else 1e-14)


def test_around_an_optimizer_of_ours() -> None:
    params, others = parameters(), parameters()
    inner = ef.SGD(params, **SETTINGS["heavy ball"])
    opt = ef.SharpnessAware(inner, "usam", RHO, skip_nonfinite=True)
    other = ef.USAM(others, **SETTINGS["heavy ball"], rho=RHO)
    for _ in range(3):
        opt.step(closure_of(opt, params))
        other.step(closure_of(other, others))
    assert all(map(same_bits, params, others))


# What is shared.


def test_groups_state_and_defaults_are_the_bases_objects() -> None:
    params = parameters()
    base = torch.optim.AdamW([{"params": params[:3], "lr": 0.3}, {"params": params[3:]}], lr=0.1)
    groups = list(base.param_groups)
    opt = ef.SharpnessAware(base, "sam", rho=0.7)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(opt, name) is getattr(base, name)
    assert all(map(lambda a, b: a is b, opt.param_groups, groups))
    assert [(g["lr"], g["rho"]) for g in base.param_groups] == [(0.3, 0.7), (0.1, 0.7)]
    opt.step(closure_of(opt, params))
    assert opt.state is base.state
    assert len(base.state) == len(params)
    before = {"state": dict(base.state), "param_groups": base.param_groups}
    opt.load_state_dict(base.state_dict())
    assert opt.state is base.state
    assert opt.param_groups is base.param_groups
    assert before["param_groups"] is not base.param_groups  # torch makes new ones


def test_there_is_no_other_attribute_of_the_base() -> None:
    opt = ef.SharpnessAware(torch.optim.SGD(parameters(), lr=0.1))
    with pytest.raises(AttributeError, match="'SharpnessAware' object has no attribute 'nothing'"):
        opt.nothing  # noqa: B018


def test_groups_that_have_rho_keep_it() -> None:
    params = parameters()
    base = torch.optim.SGD([{"params": params[:2], "rho": 0.0}, {"params": params[2:]}], lr=0.1)
    opt = ef.SharpnessAware(base, rho=0.7)
    assert [g["rho"] for g in opt.param_groups] == [0.0, 0.7]
    exact = Exact(params, {"lr": 0.1}, [0.0] * 2 + [0.7] * 4)
    opt.step(closure_of(opt, params))
    exact.step()
    assert distance(params, exact.x) < 1e-14


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_a_group_added_through_either_ascends(through: str) -> None:
    params = parameters()
    base = torch.optim.SGD(params[:3], lr=0.1)
    opt = ef.SharpnessAware(base, rho=0.3)
    opt.step(closure_of(opt, params))
    exact = Exact(params, {"lr": 0.1}, 0.3)
    added = {"params": params[3:], "lr": 0.1}
    (opt if through == "wrapper" else base).add_param_group(added)
    assert opt.param_groups[1]["rho"] == 0.3
    for _ in range(2):
        opt.zero_grad()
        opt.step(closure_of(opt, params))
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_a_group_that_is_refused_is_not_added() -> None:
    params = parameters()
    base = torch.optim.SGD(params[:3], lr=0.1)
    opt = ef.SharpnessAware(base, rho=0.3)
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, and is -1"):
        opt.add_param_group({"params": params[3:], "rho": -1.0})
    with pytest.raises(TypeError, match=r"torch\.complex64"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(base.param_groups) == 1
    closure_of(opt, params)()
    opt.ascend()
    with pytest.raises(RuntimeError, match=r"add_param_group\(\) while the parameters are"):
        opt.add_param_group({"params": params[3:]})
    assert len(base.param_groups) == 1


@pytest.mark.parametrize("base", [None, "AdamW", torch.optim.SGD, nn.Linear(2, 2)])
def test_not_an_optimizer(base: Any) -> None:
    with pytest.raises(
        TypeError, match=r"SharpnessAware wraps an optimizer, as in .* and was given"
    ):
        ef.SharpnessAware(base)


def test_arguments_that_are_refused_leave_the_base_alone() -> None:
    base = torch.optim.SGD(parameters(), lr=0.1)
    with pytest.raises(ValueError, match="unknown method 'sgd': choose one of usam, sam"):
        ef.SharpnessAware(base, "sgd")
    with pytest.raises(TypeError, match="method 'sam' has no option ascent"):
        ef.SharpnessAware(base, "sam", ascent="anchored")
    for name in ("maximize", "fused", "amsgrad"):  # the base's
        with pytest.raises(TypeError, match=f"method 'usam' has no option {name}"):
            ef.SharpnessAware(base, **{name: True})
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, and is -1"):
        ef.SharpnessAware(base, rho=-1)
    assert "rho" not in base.param_groups[0]
    assert "rho" not in base.defaults


def test_step_hooks_of_both_run_once_a_step() -> None:
    params = parameters()
    base = torch.optim.SGD(params, lr=0.1)
    opt = ef.SharpnessAware(base, "two_step_usam")
    events: list[str] = []
    opt.register_step_pre_hook(lambda *_: events.append("wrapper"))
    base.register_step_pre_hook(lambda *_: events.append("base"))
    base.register_step_post_hook(lambda *_: events.append("base done"))
    opt.register_step_post_hook(lambda *_: events.append("done"))
    opt.step(closure_of(opt, params))
    assert events == ["wrapper", "base", "base done", "done"]


def test_distributed_checkpointing_primes_it() -> None:
    """A step of length zero creates the state and changes no parameter."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(3, 2)
    before = snapshot(list(model.parameters()))
    opt = ef.SharpnessAware(torch.optim.AdamW(model.parameters(), lr=0.1), rho=0.3)
    state_dict = get_optimizer_state_dict(model, opt)
    assert state_dict["state"].keys() == {"weight", "bias"}
    assert all(map(same_bits, list(model.parameters()), before))
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["rho"]) == (0.1, 0.3)


# Bases that fail.


@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_a_base_that_raises_leaves_x(form: str) -> None:
    params = parameters()
    base = Plain(params)
    opt = ef.SharpnessAware(base, "two_step_usam", RHO)
    closure = closure_of(opt, params)
    opt.step(closure)
    before = snapshot(params)
    base.fails = True
    if form == "closure":
        with pytest.raises(ArithmeticError, match="from the base"):
            opt.step(closure)
    else:
        closure()
        while opt.ascend():
            closure()
        with pytest.raises(ArithmeticError, match="from the base"):
            opt.step()
        opt.restore()
    assert all(map(same_bits, params, before))
    assert not opt.perturbed
    assert _perturbation.holder(params) is None
    base.fails = False
    exact = Exact(params, {"lr": 0.1}, method="sequential")
    opt.step(closure)
    exact.step()
    assert distance(params, exact.x) < 1e-14


@pytest.mark.parametrize("copied", [False, True])
def test_a_plain_checkpoint_loaded_into_the_base_keeps_rho(copied: bool) -> None:
    """Without rho the wrapper would be its base, and nobody would notice."""
    params = parameters()
    plain = torch.optim.AdamW(params, lr=0.3)
    opt = ef.SharpnessAware(torch.optim.AdamW(params, lr=0.1), "sam", RHO)
    if copied:
        opt = copy.deepcopy(opt)
    opt.base_optimizer.load_state_dict(plain.state_dict())
    assert [(g["lr"], g["rho"]) for g in opt.param_groups] == [(0.3, RHO)]
    assert opt.phase == "ascent"


def test_a_base_that_raises_in_the_explicit_form_ends_the_step() -> None:
    params = parameters()
    base = Plain(params)
    opt = ef.SharpnessAware(base, "usam", RHO)
    closure, before = closure_of(opt, params), snapshot(params)
    closure()
    assert opt.ascend()
    closure()
    base.fails = True
    with pytest.raises(ArithmeticError):
        opt.step()
    assert all(map(same_bits, params, before))
    assert (opt.phase, opt.perturbed) == ("ascent", False)
    assert _perturbation.holder(params) is None
    with pytest.raises(RuntimeError, match="needs 1 ascents before it"):
        opt.step()
