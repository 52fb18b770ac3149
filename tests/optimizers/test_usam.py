"""USAM against its definition, in float64 and autograd alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import (
    SETTINGS,
    Exact,
    closure_of,
    distance,
    parameters,
    sign_of,
    snapshot,
)
from tolerances import RUNS


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_are_the_definitions(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    params = parameters(dtype)
    opt = ef.USAM(params, **settings, rho=RHO)
    closure = closure_of(opt, params, sign_of(settings))
    exact = Exact(params, settings)
    start = snapshot(params)
    for _ in range(150):
        opt.step(closure)
        exact.step()
        assert distance(params, exact.x) <= RUNS[dtype]
    assert closure.calls == 300
    assert distance(params, start) > 0.3


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rho_matters_and_differs_by_group(settings: dict[str, Any]) -> None:
    params = parameters()
    rhos = (0.05, 0.3)
    opt = ef.USAM(
        [{"params": params[:4], "rho": rhos[0]}, {"params": params[4:], "rho": rhos[1]}], **settings
    )
    closure = closure_of(opt, params, sign_of(settings))
    exact = Exact(params, settings, [rhos[0]] * 4 + [rhos[1]] * 2)
    alike = Exact(params, settings, 0.0)
    for _ in range(5):
        opt.step(closure)
        exact.step()
        alike.step()
    assert distance(params, exact.x) < 1e-14
    assert distance(params, alike.x) > 1e-3


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_explicit_form_gives_the_same_bits(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    whole, explicit = parameters(dtype), parameters(dtype)
    opt = ef.USAM(whole, **settings, rho=RHO)
    other = ef.USAM(explicit, **settings, rho=RHO)
    closure = closure_of(opt, whole, sign_of(settings))
    evaluate = closure_of(other, explicit, sign_of(settings))
    for _ in range(10):
        loss = opt.step(closure)
        first = evaluate()
        while other.ascend():
            evaluate()
        other.step()
        assert loss.item() == first.item()
    assert all(map(same_bits, whole, explicit))
    momenta = [[s.get("momentum_buffer") for s in o.state.values()] for o in (opt, other)]
    assert len(momenta[0]) == len(momenta[1])
    for a, b in zip(*momenta, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_reference_backend_gives_the_same_bits(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    results = []
    for backend in (None, "reference"):
        params = parameters(dtype)
        opt = ef.USAM(params, **settings, rho=RHO, backend=backend)
        closure = closure_of(opt, params, sign_of(settings))
        for _ in range(10):
            opt.step(closure)
        results.append(params)
    assert all(map(same_bits, *results))


def test_the_move_is_along_the_gradient_and_saves_x() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    closure_of(opt, params)()
    before, grads = snapshot(params), snapshot([p.grad for p in params])
    assert opt.ascend()
    for p, x, g in zip(params, before, grads, strict=True):
        torch.testing.assert_close(p.detach(), x + RHO * g, rtol=1e-15, atol=1e-15)
        assert p.grad is None
    opt.restore()
    assert all(map(same_bits, params, before))


def test_state_is_sgds_and_goes_to_torch() -> None:
    settings = SETTINGS["heavy ball"]
    params = parameters()
    opt = ef.USAM(params, **settings, rho=RHO)
    closure = closure_of(opt, params)
    for _ in range(3):
        opt.step(closure)
    plain = torch.optim.SGD(params, lr=7.0)
    plain.load_state_dict(opt.state_dict())
    assert plain.param_groups[0]["lr"] == settings["lr"]
    for p in params:
        assert torch.equal(plain.state[p]["momentum_buffer"], opt.state[p]["momentum_buffer"])
    expected = [opt.state[p]["momentum_buffer"].mul(0.8) for p in params]
    opt.zero_grad()
    for p in params:
        p.grad = torch.zeros_like(p)
    plain.param_groups[0]["weight_decay"] = 0.0
    plain.step()
    torch.testing.assert_close([plain.state[p]["momentum_buffer"] for p in params], expected)


def test_what_sgds_groups_lack_keeps_its_value() -> None:
    params = parameters()
    plain = torch.optim.SGD(params, **SETTINGS["heavy ball"])
    plain.step(closure_of(plain, params))
    opt = ef.USAM(params, lr=7.0, rho=0.4)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["rho"] == 0.4
    assert opt.param_groups[0]["lr"] == SETTINGS["heavy ball"]["lr"]
    for p in params:
        momentum = opt.state[p]["momentum_buffer"]
        assert torch.equal(momentum, plain.state[p]["momentum_buffer"])
