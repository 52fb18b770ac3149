"""Arguments of torch's optimizers, gradients kept by an ascent, hyperparameters changed later."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Unpack

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from eigenfilter.optimizers import Options
from optimizers.problems import (
    METHODS,
    Exact,
    closure_of,
    distance,
    loss_of,
    parameters,
    snapshot,
)

MAKERS: dict[str, Callable[..., Any]] = {
    "SGD": ef.SGD,
    "USAM": ef.USAM,
    "SAM": ef.SAM,
    "TwoStepUSAM": ef.TwoStepUSAM,
    "HessianUSAM": ef.HessianUSAM,
    "AdamW": ef.AdamW,
}
HARMLESS: list[dict[str, Any]] = [
    {"fused": True, "capturable": True},
    {"fused": False, "foreach": True},
    {"fused": None, "foreach": None, "differentiable": False, "amsgrad": False},
]


@pytest.mark.parametrize("arguments", HARMLESS, ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_arguments_of_torch_that_change_nothing(
    make: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    params, plain = parameters(), parameters()
    opt, other = make(params, lr=0.1, **arguments), make(plain, lr=0.1)
    for each, own in ((opt, params), (other, plain)):
        for _ in range(2):
            each.step(closure_of(each, own))
    assert all(map(same_bits, params, plain))
    assert opt.state_dict()["param_groups"] == other.state_dict()["param_groups"]


@pytest.mark.parametrize("name", ["amsgrad", "differentiable"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_arguments_of_torch_that_are_refused(make: Callable[..., Any], name: str) -> None:
    message = (
        rf"{name}=True is not supported.*use torch\.optim|{name}=True.*use the torch optimizer"
    )
    with pytest.raises(ValueError, match=message):
        make(parameters(), lr=0.1, **{name: True})
    with pytest.raises(ValueError, match=message):
        make([{"params": parameters(), name: True}], lr=0.1)
    opt = make(parameters(), lr=0.1)
    saved = opt.state_dict()
    saved["param_groups"][0][name] = True
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert name not in opt.param_groups[0]


def test_arguments_of_torch_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="fused must be True or False, and is 'yes'"):
        ef.SGD(parameters(), lr=0.1, fused="yes")
    for name in ("maximize", "stochastic_rounding", "skip_nonfinite", "release_gradients"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, and is 'no'"):
            ef.SGD(parameters(), lr=0.1, **{name: "no"})
    with pytest.raises(TypeError, match="has no option fuse"):
        ef.AdamW(parameters(), fuse=True)


def test_amsgrad_by_its_place() -> None:
    """torch.optim.AdamW has the argument in the same place."""
    ef.AdamW(parameters(), 1e-3, (0.9, 0.99), 1e-8, 1e-2, False)
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        ef.AdamW(parameters(), 1e-3, (0.9, 0.99), 1e-8, 1e-2, True)


def test_adams_state_with_another_weight_decay() -> None:
    params = parameters()
    opt = ef.AdamW(params)
    with pytest.raises(ValueError, match="adds weight decay to the gradient, as AdamW does not"):
        opt.load_state_dict(torch.optim.Adam(params, weight_decay=0.1).state_dict())
    opt.load_state_dict(torch.optim.Adam(params).state_dict())


# Gradients that are kept.


@pytest.mark.parametrize("method", [name for name in METHODS if name != "product"])
def test_gradients_in_one_flat_buffer(method: str) -> None:
    """Views of it, filled by backward, cleared where they lie, never replaced.

    A gradient with a graph ("product") is a new tensor in torch itself.
    """
    params = parameters()
    opt = METHODS[method].make(params, lr=0.1, set_to_none=False)
    exact = Exact(params, {"lr": 0.1}, METHODS[method].rho, method)
    flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    begin = 0
    for p in params:
        p.grad = flat.as_strided(p.shape, p.stride(), begin)
        begin += p.numel()
    views = [p.grad for p in params]

    def closure() -> Tensor:
        flat.zero_()
        loss = loss_of(params)
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
        exact.step()
        assert all(p.grad is view for p, view in zip(params, views, strict=True))
        assert flat.any()
    assert distance(params, exact.x) < (1e-7 if method == "difference" else 1e-14)


def test_gradients_kept_in_the_explicit_form() -> None:
    params = parameters()
    base = torch.optim.SGD(params, lr=0.1)
    opt = ef.SharpnessAware(base, "two_step_usam", RHO, set_to_none=False)
    exact = Exact(params, {"lr": 0.1}, RHO, "sequential")
    for _ in range(2):
        opt.zero_grad(set_to_none=False)
        loss_of(params).backward()
        grads = [p.grad for p in params]
        while opt.ascend():
            assert all(p.grad is g for p, g in zip(params, grads, strict=True))
            assert not any(g.any() for g in grads)
            loss_of(params).backward()
        opt.step()
        exact.step()
    assert distance(params, exact.x) < 1e-14


def test_keeping_gradients_and_releasing_them() -> None:
    with pytest.raises(ValueError, match="set_to_none=False keeps them: choose one"):
        ef.USAM(parameters(), set_to_none=False, release_gradients=True)


def test_a_gradient_with_a_graph_is_cleared_with_it() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO, hvp="autograd", set_to_none=False)
    exact = Exact(params, {"lr": 0.1}, RHO, "product")
    for _ in range(2):
        opt.step(closure_of(opt, params))
        exact.step()
    assert distance(params, exact.x) < 1e-14
    closure_of(opt, params)()
    opt.ascend()
    assert all(p.grad.grad_fn is None and not p.grad.any() for p in params)


# Hyperparameters that are changed between steps.

BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("lr", float("nan"), ValueError, "lr must be at least 0 and finite, and is nan"),
    ("lr", -0.1, ValueError, "lr must be at least 0 and finite, and is -0.1"),
    ("lr", None, TypeError, "lr must be a number or a one-element tensor, and is None"),
    ("lr", "0.1", TypeError, "lr must be a number or a one-element tensor, and is '0.1'"),
    ("lr", torch.tensor(float("nan")), ValueError, "lr must be at least 0 and finite"),
    ("lr", 10**400, ValueError, "lr must be finite, and is beyond every float"),
    ("lr", torch.ones(2), ValueError, "lr must be a number or a one-element tensor"),
    ("lr", torch.tensor(1), TypeError, "lr must be a number or a one-element float32 or float64"),
    ("rho", float("inf"), ValueError, "rho must be at least 0 and finite, and is inf"),
    ("rho", None, TypeError, "rho must be a number or a one-element tensor, and is None"),
    ("rho", torch.tensor(-1.0), ValueError, "rho must be at least 0 and finite, and is -1.0"),
    ("momentum", "heavy", TypeError, "momentum must be a number or a one-element tensor"),
    ("dampening", float("nan"), ValueError, "dampening must be finite, and is nan"),
    ("weight_decay", float("nan"), ValueError, "weight_decay must be at least 0 and finite"),
]


@pytest.mark.parametrize("form", ["closure", "ascend", "step"])
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=str)
def test_hyperparameters_are_checked_at_every_step(
    name: str, value: Any, error: type[Exception], message: str, form: str
) -> None:
    params = parameters()
    opt = ef.USAM([{"params": params[:3]}, {"params": params[3:]}], lr=0.1, momentum=0.8, rho=RHO)
    closure = closure_of(opt, params)
    opt.step(closure)
    before = snapshot(params)
    closure()
    if form == "step":
        opt.ascend()
        closure()
    opt.param_groups[1][name] = value
    with pytest.raises(error, match=message):
        {"closure": lambda: opt.step(closure), "ascend": opt.ascend, "step": opt.step}[form]()
    opt.restore()
    assert all(map(same_bits, params, before))
    with pytest.raises(error, match=message):
        ef.USAM([{"params": parameters(), name: value}], lr=0.1, momentum=0.8)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (float("nan"), 0.9), 0.9, (0.9,), ("a", 0.9)])
def test_betas_are_checked_at_every_step(betas: Any) -> None:
    params = parameters()
    opt = ef.AdamW(params)
    closure_of(opt, params)()
    opt.param_groups[0]["betas"] = betas
    with pytest.raises((TypeError, ValueError), match="betas must be"):
        opt.step()
    with pytest.raises((TypeError, ValueError), match="betas must be"):
        ef.AdamW(parameters(), betas=betas)


@pytest.mark.parametrize("cls", MAKERS.values(), ids=MAKERS)
def test_signatures_show_the_options(cls: Any) -> None:
    """help() shows the signature, and `Options` describes what is in it."""
    shown = inspect.signature(cls).parameters
    positional = [name for name, p in shown.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if cls is ef.AdamW:
        assert positional == ["params", "lr", "betas", "eps", "weight_decay", "amsgrad"]
    else:
        assert positional == ["params", "lr", "momentum", "dampening", "weight_decay", "nesterov"]
    assert shown["backend"].default is None
    assert shown["maximize"].default is False
    assert shown["set_to_none"].default is True
    assert shown["options"].kind is inspect.Parameter.VAR_KEYWORD
    for name in Options.__annotations__:
        assert name in shown or f"`{name}`" in (Options.__doc__ or "")


def test_signatures_of_subclasses_show_the_options() -> None:
    class Own(ef.SGD):
        def __init__(
            self, params: Any, *, maximize: bool = True, **options: Unpack[Options]
        ) -> None:
            super().__init__(params, lr=0.1, maximize=maximize, **options)

    shown = inspect.signature(Own).parameters
    assert list(shown)[:3] == ["params", "maximize", "stochastic_rounding"]
    assert shown["maximize"].default is True
    assert Own(parameters(), backend="reference").param_groups[0]["maximize"] is True


@pytest.mark.parametrize("name", ["maximize", "stochastic_rounding"])
def test_groups_may_have_options_of_their_own(name: str) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} | own for own in ({}, {name: True})]
    opt = ef.USAM(groups, lr=0.1)
    assert [group[name] for group in opt.param_groups] == [False, True]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_help_explains_every_option(make: type) -> None:
    text = inspect.getdoc(make) or ""
    own = ["amsgrad"] if make is ef.AdamW else []
    for name in (*Options.__annotations__, *own):
        assert re.search(rf"^    (\w+, )*{name}(, \w+)*: \w", text, re.MULTILINE), name
    assert "options: the keyword" not in text
