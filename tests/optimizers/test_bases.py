"""What SharpnessAware wraps: bases of any make, their own `rho`, and those it refuses."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import Exact, closure_of, distance, parameters, snapshot


class Unregistered(torch.optim.Optimizer):
    """An optimizer around another that never calls Optimizer.__init__, as timm's Lookahead."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = base.state

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        self.state = self.base.state


class Nested(Unregistered):
    """One whose state_dict has a form of its own, as pytorch_optimizer's Lookahead."""

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["inner"])


class Prepared(torch.optim.Optimizer):
    """One that a framework has wrapped: groups, state and defaults are properties."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("wrap", [Unregistered, Nested, Prepared])
def test_bases_of_any_make(wrap: type) -> None:
    params = parameters()
    settings = {"lr": 0.1, "momentum": 0.8}
    opt = ef.SharpnessAware(wrap(torch.optim.SGD(params, **settings)), rho=RHO)
    exact = Exact(params, settings)
    for _ in range(2):
        opt.step(closure_of(opt, params))
        exact.step()
    opt.load_state_dict(opt.state_dict())
    for _ in range(2):
        opt.step(closure_of(opt, params))
        exact.step()
    assert distance(params, exact.x) < 1e-14


class WithRho(torch.optim.SGD):
    """SGD with a hyperparameter called rho, which scales its step (as Sophia's, in its way)."""

    def __init__(self, params: Any, lr: float, rho: float) -> None:
        super().__init__(params, lr)
        self.defaults["rho"] = rho
        for group in self.param_groups:
            group.setdefault("rho", rho)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad, alpha=group["lr"] * group["rho"])


def test_a_base_with_a_rho_of_its_own() -> None:
    params = parameters()
    opt = ef.SharpnessAware(WithRho(params, lr=0.2, rho=0.5), rho=RHO)
    exact = Exact(params, {"lr": 0.1})
    for _ in range(3):
        opt.step(closure_of(opt, params))
        exact.step()
    assert distance(params, exact.x) < 1e-14
    assert [(g["rho"], g["ascent_rho"]) for g in opt.param_groups] == [(0.5, RHO)]


def by_hand(x: list[Tensor], opt: torch.optim.Optimizer, at: list[nn.Parameter]) -> None:
    """A step of `opt` whose gradient is taken by hand at x + RHO g."""
    from optimizers.problems import loss_of

    points = [p.detach().requires_grad_() for p in at]
    g = torch.autograd.grad(loss_of(points), points)
    up = [(p + RHO * a).detach().requires_grad_() for p, a in zip(points, g, strict=True)]
    for p, a in zip(at, torch.autograd.grad(loss_of(up), up), strict=True):
        p.grad = a
    opt.step()


def test_adadelta() -> None:
    params, plain = parameters(), parameters()
    opt = ef.SharpnessAware(torch.optim.Adadelta(params, lr=0.5, rho=0.9), rho=RHO)
    reference = torch.optim.Adadelta(plain, lr=0.5, rho=0.9)
    for i in range(4):
        if i == 2:
            opt.load_state_dict(opt.state_dict())
        opt.step(closure_of(opt, params))
        by_hand([], reference, plain)
    assert distance(params, plain) < 1e-14
    saved = opt.state_dict()["param_groups"][0]
    assert (saved["rho"], saved["ascent_rho"]) == (0.9, RHO)


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_schedulers_leave_the_bases_rho_alone(through: str) -> None:
    base = torch.optim.Adadelta(parameters(), lr=0.5, rho=0.9)
    opt = ef.SharpnessAware(base, rho=0.2)
    scheduler = ef.schedulers.RhoScheduler(
        opt if through == "wrapper" else base, "linear", total_steps=4
    )
    for _ in range(2):
        scheduler.optimizer.step()
        scheduler.step()
    assert opt.param_groups[0]["rho"] == 0.9
    assert opt.param_groups[0]["ascent_rho"] == pytest.approx(0.1)
    assert scheduler.get_last_rho() == [pytest.approx(0.1)]


def test_a_group_added_to_a_base_with_a_rho_of_its_own() -> None:
    params = parameters()
    base = torch.optim.Adadelta(params[:3], lr=0.5, rho=0.9)
    opt = ef.SharpnessAware(base, rho=0.2)
    base.add_param_group({"params": params[3:5]})
    opt.add_param_group({"params": params[5:], "ascent_rho": 0.0, "rho": 0.8})
    values = [(g["rho"], g["ascent_rho"]) for g in opt.param_groups]
    assert values == [(0.9, 0.2), (0.9, 0.2), (0.8, 0.0)]
    copied = copy.deepcopy(opt)
    assert [(g["rho"], g["ascent_rho"]) for g in copied.param_groups] == values


def test_a_plain_checkpoint_of_adadelta_keeps_the_ascent() -> None:
    params = parameters()
    state_dict = torch.optim.Adadelta(params, lr=0.5, rho=0.8).state_dict()
    base = torch.optim.Adadelta(params, lr=0.5, rho=0.9)
    opt = ef.SharpnessAware(base, rho=0.2)
    for load in (opt.load_state_dict, base.load_state_dict):
        load(state_dict)
        assert [(g["rho"], g["ascent_rho"]) for g in opt.param_groups] == [(0.8, 0.2)]


def test_wrapping_the_same_base_again_keeps_its_rho() -> None:
    base = torch.optim.SGD(parameters(), lr=0.1)
    ef.SharpnessAware(base, rho=0.3)
    assert ef.SharpnessAware(base, "sam", rho=0.7).param_groups[0]["rho"] == 0.3


class Ascending(torch.optim.SGD):
    """The usual interface of a SAM written as an optimizer."""

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Around(torch.optim.SGD):
    """An optimizer around another."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__([p for g in base.param_groups for p in g["params"]], lr=0.1)
        self._base_optimizer = base


REFUSED = {
    "around LBFGS": (lambda p: Around(torch.optim.LBFGS(p)), "LBFGS evaluates the loss itself"),
    "around USAM": (lambda p: Around(ef.USAM(p, lr=0.1)), "USAM takes ascents itself"),
    "LBFGS": (lambda p: torch.optim.LBFGS(p), "LBFGS evaluates the loss itself, in a closure"),
    "SAM": (lambda p: Ascending(p, lr=0.1), "Ascending takes ascents itself"),
    "USAM": (lambda p: ef.USAM(p, lr=0.1), "USAM takes ascents itself"),
    "AdamW of ours": (lambda p: ef.AdamW(p), "AdamW takes ascents itself"),
    "a wrapper": (
        lambda p: ef.SharpnessAware(torch.optim.SGD(p, lr=0.1)),
        "SharpnessAware takes ascents itself",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name: str) -> None:
    make, message = REFUSED[name]
    base = make(parameters())
    groups = [dict(g) for g in base.param_groups]
    with pytest.raises(ValueError, match=message):
        ef.SharpnessAware(base)
    assert [g.keys() for g in base.param_groups] == [g.keys() for g in groups]


class Modes(torch.optim.SGD):
    """Schedule-free: it has train() and eval()."""

    mode = "train"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_train_and_eval_are_forwarded() -> None:
    params = parameters()
    base = Modes(params, lr=0.1)
    opt = ef.SharpnessAware(base)
    opt.eval()
    assert base.mode == "eval"
    opt.train()
    assert base.mode == "train"
    closure_of(opt, params)()
    opt.ascend()
    for name in ("train", "eval"):
        with pytest.raises(RuntimeError, match=rf"{name}\(\) while the parameters are"):
            getattr(opt, name)()
    plain = ef.SharpnessAware(torch.optim.SGD(parameters(), lr=0.1))
    assert not hasattr(plain, "train")
    assert not hasattr(plain, "eval")


def test_hooks_of_the_wrapper_run() -> None:
    params = parameters()
    opt = ef.SharpnessAware(torch.optim.SGD(params, lr=0.1, momentum=0.8))
    events: list[str] = []

    def note(what: str, result: Any = None) -> Any:
        def hook(*args: Any) -> Any:
            events.append(what)
            return result(*args) if callable(result) else result

        return hook

    opt.register_state_dict_pre_hook(note("before saving"))
    opt.register_state_dict_post_hook(
        note("after saving", lambda _, state_dict: state_dict | {"more": 1})
    )
    state_dict = opt.state_dict()
    assert state_dict["more"] == 1

    def changed(_: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        groups = [group | {"lr": 0.05} for group in inputs["param_groups"]]
        return inputs | {"param_groups": groups}

    opt.register_load_state_dict_pre_hook(note("before loading", changed))
    opt.register_load_state_dict_post_hook(note("after loading"))
    opt.load_state_dict(state_dict)
    assert opt.param_groups[0]["lr"] == 0.05
    assert events == ["before saving", "after saving", "before loading", "after loading"]


def test_a_copied_base_has_one_radius() -> None:
    base = torch.optim.SGD(parameters(), lr=0.1)
    ef.SharpnessAware(base, rho=0.05)
    opt = ef.SharpnessAware(copy.deepcopy(base), rho=0.3)
    assert "ascent_rho" not in opt.param_groups[0]
    assert ef.filters.of(opt)[0].rho == opt.param_groups[0]["rho"] == 0.05


MODES = [
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.NAdam,
    torch.optim.Adagrad,
]


@pytest.mark.parametrize("mode", ["amsgrad", "foreach", "fused", "maximize"])
@pytest.mark.parametrize("make", MODES)
def test_bases_in_each_of_their_modes(make: Any, mode: str) -> None:
    if mode not in inspect.signature(make).parameters:
        return
    params, plain = parameters(), parameters()
    opt = ef.SharpnessAware(make(params, lr=0.05, **{mode: True}), rho=0.0)
    reference = make(plain, lr=0.05, **{mode: True})
    for _ in range(3):
        for each, own in ((opt, params), (reference, plain)):
            each.zero_grad()
            closure_of(each, own)()
            with torch.no_grad():
                each.step()
    assert all(map(same_bits, params, plain))


def test_a_differentiable_base_is_its_own_affair() -> None:
    ef.SharpnessAware(torch.optim.SGD(parameters(), lr=0.1, differentiable=True))


@pytest.mark.parametrize("value", [float("nan"), -0.1, "0.1"])
def test_the_bases_lr_is_checked_too(value: Any) -> None:
    params = parameters()
    opt = ef.SharpnessAware(torch.optim.SGD(params, lr=0.1))
    before = snapshot(params)
    opt.param_groups[0]["lr"] = value
    with pytest.raises((TypeError, ValueError), match="lr must be"):
        opt.step(closure_of(opt, params))
    assert all(map(same_bits, params, before))


def test_the_base_is_as_before_after_a_refusal_in_a_step() -> None:
    params = parameters()
    opt = ef.SharpnessAware(torch.optim.SGD(params, lr=0.1))
    before = snapshot(params)
    opt.param_groups[0]["rho"] = float("nan")
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, and is nan"):
        opt.step(closure_of(opt, params))
    assert all(map(same_bits, params, before))
