"""torch.amp.GradScaler: ascents take its scale, the descent goes through scaler.step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import (
    SETTINGS,
    closure_of,
    distance,
    loss_of,
    parameters,
    sign_of,
    snapshot,
)

Evaluate = Callable[[], Tensor]


def scaled(
    opt: torch.optim.Optimizer,
    params: list,
    scaler: GradScaler,
    sign: float,
    loss_of: Any = loss_of,
) -> Evaluate:
    """Gradients that carry the scaler's scale."""

    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = loss_of(params, sign)
        scaler.scale(loss).backward()
        return loss

    return evaluate


def take_step(opt: ef.USAM, scaler: GradScaler, evaluate: Evaluate) -> None:
    """One step; torch's recipe is the first and the last two lines."""
    evaluate()
    while opt.ascend(grad_scaler=scaler):
        evaluate()
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_power_of_two_changes_no_bit(dtype: torch.dtype, settings: dict) -> None:
    plain, params = parameters(dtype), parameters(dtype)
    opt, reference = (ef.USAM(p, **settings, rho=RHO) for p in (params, plain))
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=3)
    sign = sign_of(settings)
    evaluate, closure = scaled(opt, params, scaler, sign), closure_of(reference, plain, sign)
    for _ in range(8):
        take_step(opt, scaler, evaluate)
        reference.step(closure)
    assert scaler.get_scale() == 256.0
    assert opt.skipped == 0
    assert all(map(same_bits, params, plain))


@pytest.mark.parametrize("rho", [RHO, 0.0])
def test_an_overflow_lowers_the_scale_and_nothing_else(rho: float) -> None:
    """The scale starts so high that gradients overflow; skipped steps bring it down."""
    plain, params = parameters(torch.float32), parameters(torch.float32)
    settings = SETTINGS["heavy ball"]
    opt, reference = (ef.USAM(p, **settings, rho=rho) for p in (params, plain))
    scaler = GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-3)
    evaluate = scaled(opt, params, scaler, 1.0)
    before = snapshot(params)
    scales = [scaler.get_scale()]
    while True:
        take_step(opt, scaler, evaluate)
        scales.append(scaler.get_scale())
        if scales[-1] == scales[-2]:
            break
        assert scales[-1] == scales[-2] / 8
        assert all(map(same_bits, params, before))
        assert all(not m.any() for s in opt.state.values() for m in s.values())
    assert opt.skipped == len(scales) - 2 > 0
    for _ in range(3):
        take_step(opt, scaler, evaluate)
    for _ in range(4):
        reference.step(closure_of(reference, plain))
    assert all(map(same_bits, params, plain))


def test_an_overflow_in_the_ascent_alone_skips() -> None:
    """Its gradient would have been taken at the wrong point."""
    params = parameters()
    opt = ef.USAM(params, **SETTINGS["heavy ball"], rho=RHO)
    scaler = GradScaler("cpu", init_scale=1024.0)
    evaluate = scaled(opt, params, scaler, 1.0)
    take_step(opt, scaler, evaluate)
    before = snapshot(params)
    momenta = snapshot([s["momentum_buffer"] for s in opt.state.values()])
    evaluate()
    params[-1].grad[7] = torch.inf
    assert opt.ascend(grad_scaler=scaler)
    assert all(map(same_bits, params, before))
    evaluate()
    scaler.step(opt)
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))
    after = [s["momentum_buffer"] for s in opt.state.values()]
    assert all(map(same_bits, after, momenta))


def test_the_scaler_leaves_nothing_behind() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    scaler = GradScaler("cpu", init_scale=1024.0)
    take_step(opt, scaler, scaled(opt, params, scaler, 1.0))
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")
    plain, before = closure_of(opt, params), snapshot(params)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt.step(plain)
    reference = ef.USAM(twin, lr=0.1, rho=RHO)
    reference.step(closure_of(reference, twin))
    assert all(map(same_bits, params, twin))
    assert distance(params, before) > 1e-3


def test_a_scaler_that_is_off_does_nothing() -> None:
    params, plain = parameters(), parameters()
    opt, reference = (ef.USAM(p, **SETTINGS["nesterov"], rho=RHO) for p in (params, plain))
    scaler = GradScaler("cpu", enabled=False)
    evaluate = scaled(opt, params, scaler, 1.0)
    for _ in range(3):
        take_step(opt, scaler, evaluate)
        reference.step(closure_of(reference, plain))
    assert all(map(same_bits, params, plain))


def test_unscaling_an_ascents_gradient_is_refused() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaled(opt, params, scaler, 1.0)()
    scaler.unscale_(opt)
    before = snapshot(params)
    message = r"unscale_\(\) was called for an ascent's gradient, which ascend\(\) unscales itself"
    with pytest.raises(RuntimeError, match=message):
        opt.ascend(grad_scaler=scaler)
    assert all(map(same_bits, params, before))
    assert not opt.perturbed


def test_unscaling_through_a_wrapper_is_refused() -> None:
    """The scaler then knows the wrapper, which shares the optimizer's step."""
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    wrapper = copying(opt)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaled(opt, params, scaler, 1.0)()
    scaler.unscale_(wrapper)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="called for an ascent's gradient"):
        wrapper.ascend(grad_scaler=scaler)
    assert all(map(same_bits, params, before))


def copying(opt: Any) -> Any:
    """A wrapper that begins with the optimizer's `__dict__` and inherits its methods."""
    wrapper = object.__new__(type("Copying", (type(opt),), {}))
    wrapper.__dict__ = dict(opt.__dict__)
    return wrapper


@pytest.mark.parametrize("by", ["unscale_", "clip_grad_norm_"])
def test_unscaling_the_descents_gradient(by: str) -> None:
    params, plain = parameters(), parameters()
    opt, reference = (ef.USAM(p, **SETTINGS["heavy ball"], rho=RHO) for p in (params, plain))
    scaler = GradScaler("cpu", init_scale=1024.0)
    evaluate, closure = scaled(opt, params, scaler, 1.0), closure_of(reference, plain)
    for _ in range(3):
        evaluate()
        while opt.ascend(grad_scaler=scaler):
            evaluate()
        if by == "unscale_":
            scaler.unscale_(opt)
        else:
            opt.clip_grad_norm_(1e9, grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        reference.step(closure)
    assert all(map(same_bits, params, plain))


# A scaler that takes part in half of a step.


@pytest.mark.parametrize("half", ["ascent", "descent"])
def test_a_scaler_in_half_of_a_step_is_refused(half: str) -> None:
    opt, scaler, _, evaluate = small_problem(ef.USAM)
    evaluate()
    assert opt.ascend(grad_scaler=scaler if half == "ascent" else None)
    evaluate()
    with pytest.raises(RuntimeError, match="must agree on the scaler"):
        opt.step() if half == "ascent" else scaler.step(opt)


@pytest.mark.parametrize("first", [False, True])
def test_one_of_two_ascents_without_the_scaler(first: bool) -> None:
    opt, scaler, [x], evaluate = small_problem(ef.TwoStepUSAM)
    before = x.detach().clone()
    evaluate()
    assert opt.ascend(grad_scaler=scaler if first else None)
    evaluate()
    there = x.detach().clone()
    with pytest.raises(RuntimeError, match="must agree on the scaler"):
        opt.ascend(grad_scaler=None if first else scaler)
    assert torch.equal(x.detach(), there)
    opt.restore()
    assert torch.equal(x.detach(), before)


def test_a_closure_passed_to_the_scaler() -> None:
    opt, scaler, params, evaluate = small_problem(ef.USAM)
    evaluate()
    with pytest.raises(RuntimeError, match="cannot step with a closure"):
        scaler.step(opt, closure_of(opt, params, loss_of=square))


def test_a_refused_step_leaves_no_scale_behind() -> None:
    opt, scaler, params, evaluate = small_problem(ef.USAM)
    evaluate()
    with pytest.raises(RuntimeError, match="ascents before it"):
        scaler.step(opt)
    before = params[0].detach().clone()
    opt.step(closure_of(opt, params, loss_of=square))
    perturbed = before * (1 - 0.1 * 2 * (1 + 0.05 * 2))
    torch.testing.assert_close(params[0].detach(), perturbed)


def square(params: list, sign: float) -> Tensor:
    return sign * (params[0] ** 2).sum()


def small_problem(make: Any) -> tuple[Any, GradScaler, list, Evaluate]:
    params = [torch.nn.Parameter(torch.tensor([1.0, -2.0]))]
    opt, scaler = make(params, lr=0.1, rho=0.05), GradScaler("cpu", init_scale=1024.0)
    return opt, scaler, params, scaled(opt, params, scaler, 1.0, square)
