"""Every method with SGD's descent against its definition, in float64 and autograd alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import (
    METHODS,
    SETTINGS,
    Exact,
    closure_of,
    distance,
    loss_of,
    parameters,
    sign_of,
    snapshot,
)
from tolerances import RUNS

HEAVY = SETTINGS["heavy ball"]

methods = pytest.mark.parametrize("method", METHODS)
all_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def allowed(method: str, dtype: torch.dtype) -> float:
    """Largest distance of a run from its definition's.

    A finite difference goes out by eps g with eps ||g|| = c (1 + ||x||) and c the root of the
    machine precision, and is off by f''' eps g^2 / 2, at most c times 23 for this problem's largest
    |f'''| = 1.3, |g| = 6 and (1 + ||x||) / ||g|| = 1; rounding adds as much again at most. By rho
    and lr f'' = 0.4 a step is off by 1.3 c to 2.6 c; later gradients are smaller, and so are
    errors. Measured: 1.2 c (float64), 1.4 c (float32), 1.5 c (float16), 1.3 c (bfloat16).
    """
    c = torch.finfo(dtype).eps ** 0.5 if method == "difference" else 0.0
    return RUNS[dtype] + 3 * c


def for_runs(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under which runs of a method can be compared to the last digit.

    Where the gradient vanishes its direction is that of rounding errors, and a normalized ascent
    goes along with it; with a weight decay that counts, no gradient vanishes.
    """
    return settings | {"weight_decay": 0.5} if METHODS[method].rho > 1 else settings


@all_settings
@methods
def test_steps_are_the_definitions(
    dtype: torch.dtype, method: str, settings: dict[str, Any]
) -> None:
    """Finite differences are meaningful in bfloat16 too: rho changes a run by 0.7 and more."""
    settings = for_runs(method, settings)
    params = parameters(dtype)
    opt = METHODS[method].make(params, **settings)
    closure = closure_of(opt, params, sign_of(settings))
    exact = Exact(params, settings, METHODS[method].rho, method)
    start = snapshot(params)
    for _ in range(36):
        opt.step(closure)
        exact.step()
        assert distance(params, exact.x) <= allowed(method, dtype)
    assert closure.calls == 36 * METHODS[method].calls
    assert distance(params, start) > 0.3


@all_settings
def test_methods_differ_by_more_than_is_tolerated(settings: dict[str, Any]) -> None:
    """A step that took no ascent would show in any dtype, and one that took another's too.

    Except that a finite difference in bfloat16 could pass for other methods.
    """
    settings = for_runs("sam", settings)
    runs = {name: Exact(parameters(), settings, m.rho, name) for name, m in METHODS.items()}
    del runs["product"]  # the definition of "difference"
    runs["none"] = Exact(parameters(), settings, 0.0)
    apart = dict.fromkeys(itertools.combinations(runs, 2), 0.0)
    for _ in range(16):
        for run in runs.values():
            run.step()
        for a, b in apart:
            apart[a, b] = max(apart[a, b], distance(runs[a].x, runs[b].x))
    for pair, d in apart.items():
        dtype = torch.bfloat16 if "none" in pair else torch.float16
        assert d > max(allowed(name, dtype) for name in pair), pair


@methods
def test_rho_differs_by_group_and_may_be_zero(method: str) -> None:
    """The group without an ascent is no part of the norm, nor of the Hessian's product."""
    rho = METHODS[method].rho
    rhos = [rho, 0.0, 2.5 * rho]
    params = parameters()
    groups = [
        {"params": params[2 * i : 2 * i + 2], "rho": group_rho} for i, group_rho in enumerate(rhos)
    ]
    opt = METHODS[method].make(groups, **HEAVY)
    closure = closure_of(opt, params)
    exact = Exact(params, HEAVY, [r for r in rhos for _ in range(2)], method)
    alike = Exact(params, HEAVY, rho, method)
    for _ in range(5):
        opt.step(closure)
        exact.step()
        alike.step()
    assert closure.calls == 5 * METHODS[method].calls
    assert distance(params, exact.x) <= 3 * allowed(method, torch.float64)
    assert distance(params, alike.x) > 1e-3


@methods
def test_the_point_of_the_descent(method: str) -> None:
    """x is saved whatever the number of ascents, and comes back bit for bit."""
    params = parameters()
    opt = METHODS[method].make(params, lr=0.1)
    closure = closure_of(opt, params)
    exact = Exact(params, {}, METHODS[method].rho, method)
    before = snapshot(params)
    points = []
    closure()
    while opt.ascend():
        points.append(snapshot(params))
        assert all(p.grad is None for p in params)
        closure()
    assert len(points) == METHODS[method].calls - 1
    assert distance(points[-1], exact.descent_point()) <= 20 * allowed(method, torch.float64)
    for earlier, later in itertools.pairwise([before, *points]):
        assert distance(earlier, later) > 1e-9
    opt.restore()
    assert all(map(same_bits, params, before))


@methods
def test_the_explicit_form_gives_the_same_bits(dtype: torch.dtype, method: str) -> None:
    whole, explicit = parameters(dtype), parameters(dtype)
    opt, other = (METHODS[method].make(params, **HEAVY) for params in (whole, explicit))
    closure, evaluate = closure_of(opt, whole), closure_of(other, explicit)
    for _ in range(8):
        loss = opt.step(closure)
        first = evaluate()
        while other.ascend():
            evaluate()
        other.step()
        assert loss.item() == first.item()
    assert all(map(same_bits, whole, explicit))
    momenta = [
        [opt.state[p]["momentum_buffer"] for p in whole]
        for opt, whole in ((opt, whole), (other, explicit))
    ]
    assert all(map(same_bits, *momenta))


@pytest.mark.parametrize("name", ["heavy ball", "maximize nesterov"])
@methods
def test_the_reference_backend_gives_the_same_bits(
    dtype: torch.dtype, method: str, name: str
) -> None:
    """Where norms are taken, within their rounding: the backends sum in different orders."""
    results = []
    for backend in (None, "reference"):
        params = parameters(dtype)
        opt = METHODS[method].make(params, **SETTINGS[name], backend=backend)
        closure = closure_of(opt, params, sign_of(SETTINGS[name]))
        for _ in range(6):
            opt.step(closure)
        results.append(params)
    if METHODS[method].normalized:
        assert distance(*results) <= allowed(method, dtype)
    else:
        assert all(map(same_bits, *results))


@pytest.mark.parametrize("method", ["sequential", "anchored"])
def test_a_gradient_that_appears_in_the_second_ascent(method: str) -> None:
    """Its parameter is perturbed for the first time then."""
    params = parameters()
    opt = METHODS[method].make(params, lr=0.1)
    before = snapshot(params)

    def evaluate(present: int) -> list[Tensor]:
        opt.zero_grad()
        loss_of(params).backward()
        for p in params[present:]:
            p.grad = None
        return [p.grad.clone() for p in params[:present]]

    evaluate(4)
    opt.ascend()
    perturbed = snapshot(params)
    assert all(map(same_bits, params[4:], before[4:]))
    grads = evaluate(6)
    opt.ascend()
    origins = perturbed if method == "sequential" else before
    expected = [y + RHO * g for y, g in zip(origins, grads, strict=True)]
    assert distance(params, expected) < 1e-15
    opt.restore()
    assert all(map(same_bits, params, before))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (ef.TwoStepUSAM, {"ascent": "both"}, 'must be "sequential" or "anchored", and is \'both\''),
        (ef.HessianUSAM, {"hvp": "exact"}, 'must be "finite_difference" or "autograd", and is'),
        (ef.HessianUSAM, {"fd_step": 0.0}, "fd_step must be positive, and is 0.0"),
        (ef.HessianUSAM, {"fd_step": float("nan")}, "fd_step must be positive, and is nan"),
        (ef.HessianUSAM, {"hvp": "autograd", "fd_step": 0.1}, "belongs to hvp=.finite_difference"),
        (ef.AdamW, {"method": "SAM"}, "unknown method 'SAM': choose one of usam, sam, two_step_"),
    ],
)
def test_options_that_do_not_exist(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters(), lr=0.1, **arguments)


def test_an_option_of_another_method() -> None:
    with pytest.raises(TypeError, match="method 'usam' has no option adaptive"):
        ef.AdamW(parameters(), method="usam", adaptive=True)
