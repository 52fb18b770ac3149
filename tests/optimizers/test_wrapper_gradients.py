"""SharpnessAware: gradients of any layout, scaled, clipped and skipped, around many bases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import (
    SETTINGS,
    backward,
    closure_of,
    distance,
    loss_of,
    parameters,
    snapshot,
    state_of,
)

ADAMW = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.03}

# Bases that are told on the device to skip, and bases that are not.
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, **ADAMW, foreach=False),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, **ADAMW, foreach=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, **ADAMW, fused=True),
    "SGD, fused": lambda params: torch.optim.SGD(params, **SETTINGS["heavy ball"], fused=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.02, momentum=0.7),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}

bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "other strides": lambda g: g.t().contiguous().t(),
    "expanded": lambda g: g[:1, :1].expand(g.shape),
    "lazily negated": lambda g: torch._neg_view(-g),
}


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_any_form(form: str, skip_nonfinite: bool) -> None:
    """Steps are those of the same values laid out as the parameter is, within torch's rounding."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for _ in range(2))
    opt, other = (
        ef.SharpnessAware(torch.optim.SGD([x], lr=0.1), rho=RHO, skip_nonfinite=skip_nonfinite)
        for x in (p, q)
    )
    for take in ("ascend", "step"):
        for x, o, give in ((p, opt, FORMS[form]), (q, other, lambda g: FORMS[form](g).clone())):
            x.grad = give((x * 1.3 - 0.7).detach())
            getattr(o, take)()
    assert distance([p], [q]) < 2e-7
    assert opt.skipped == 0


@pytest.mark.parametrize("where", ["ascent", "descent"])
@bases
def test_an_overflow_skips_the_step_and_lowers_the_scale(base: Any, where: str) -> None:
    """Every other step is the unscaled run's, bit for bit.

    An ascent that overflows perturbs nothing, so that the gradients after it overflow too.
    """
    params, plain = parameters(torch.float32), parameters(torch.float32)
    opt, other = (ef.SharpnessAware(base(p), "two_step_usam", RHO) for p in (params, plain))
    scaler = GradScaler("cpu", init_scale=1024.0)

    def evaluate(overflows: bool) -> None:
        opt.zero_grad()
        backward(opt, scaler.scale(loss_of(params)))
        if overflows:
            params[-1].grad[5] = torch.inf

    def step(where_bad: str) -> None:
        evaluate(where_bad == "ascent")
        while opt.ascend(grad_scaler=scaler):
            assert where_bad != "ascent" or all(map(same_bits, params, before))
            evaluate(where_bad == "ascent" or (where_bad == opt.phase))
        scaler.step(opt)
        scaler.update()

    for _ in range(2):
        step("nothing")
    before, state = snapshot(params), state_of(opt, params)
    step(where)
    assert (opt.skipped, scaler.get_scale()) == (1, 512.0)
    assert all(map(same_bits, params, before))
    assert all(map(same_bits, state_of(opt, params), state))
    assert not opt.perturbed
    step("nothing")
    assert (opt.skipped, scaler.get_scale()) == (1, 512.0)
    for name in ("grad_scale", "found_inf"):
        assert not hasattr(opt, name)
        assert not hasattr(opt.base_optimizer, name)
    for _ in range(3):
        other.step(closure_of(other, plain))
    assert all(map(same_bits, params, plain))


@pytest.mark.parametrize("by", ["unscale_", "clip_grad_norm_"])
@bases
def test_unscaling_the_descents_gradient(base: Any, by: str) -> None:
    params, plain = parameters(torch.float32), parameters(torch.float32)
    opt, other = (ef.SharpnessAware(base(p), "usam", RHO) for p in (params, plain))
    scaler = GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        opt.zero_grad()
        scaler.scale(loss_of(params)).backward()
        opt.ascend(grad_scaler=scaler)
        scaler.scale(loss_of(params)).backward()
        if by == "unscale_":
            scaler.unscale_(opt)
        else:
            opt.clip_grad_norm_(1e9, grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        other.step(closure_of(other, plain))
    assert all(map(same_bits, params, plain))


@pytest.mark.parametrize("name", [name for name in BASES if name != "SGD, fused"])
def test_the_first_step_may_be_the_one_that_is_skipped(name: str) -> None:
    """torch's fused SGD is left out: it would go on from momentum that it never wrote."""
    base = BASES[name]
    params, plain = parameters(torch.float32), parameters(torch.float32)
    opt = ef.SharpnessAware(base(params), "usam", RHO, skip_nonfinite=True)
    other = ef.SharpnessAware(base(plain), "usam", RHO)
    before = snapshot(params)
    for is_bad in (True, False, False):
        calls = closure_of(opt, params)

        def closure(calls: Any = calls, is_bad: bool = is_bad) -> Tensor:
            loss = calls()
            if is_bad:
                params[3].grad[1, 2] = torch.nan
            return loss

        opt.step(closure)
        assert opt.skipped == 1
        if is_bad:
            assert all(map(same_bits, params, before))
        else:
            other.step(closure_of(other, plain))
            assert all(map(same_bits, params, plain))


def test_clipping_after_the_ascents() -> None:
    params = parameters()
    opt = ef.SharpnessAware(torch.optim.SGD(params, lr=1.0), "sam", rho=2.0)
    closure = closure_of(opt, params)
    before = snapshot(params)
    closure()
    with pytest.raises(RuntimeError, match="clips the descent gradient"):
        opt.clip_grad_norm_(0.25)
    opt.ascend()
    closure()
    assert opt.clip_grad_norm_(0.25) > 1
    opt.step()
    moves = [(p.detach() - x).flatten() for p, x in zip(params, before, strict=True)]
    assert torch.cat(moves).norm().item() == pytest.approx(0.25, rel=1e-5)


def test_scaler_attributes_are_removed_from_a_base_that_raises() -> None:
    params = parameters(torch.float32)
    base = torch.optim.AdamW(params, **ADAMW, fused=True)
    opt = ef.SharpnessAware(base, rho=0.0)
    scaler = GradScaler("cpu", init_scale=64.0)
    base.register_step_pre_hook(lambda *_: 1 / 0)
    scaler.scale(loss_of(params)).backward()
    with pytest.raises(ZeroDivisionError):
        scaler.step(opt)
    for name in ("grad_scale", "found_inf"):
        assert not hasattr(opt, name)
        assert not hasattr(base, name)
