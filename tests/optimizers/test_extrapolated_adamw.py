"""AdamW ahead along its update: the parameters hold y = x - e u between steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import same_bits
from optimizers.extrapolated import (
    ADAMW,
    TOLERANCES,
    Formula,
    distance,
    gradient,
    loss_of,
    parameters,
    set_gradients,
    train,
)

E = 0.05
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "without momentum": {"betas": (0.0, 0.9)},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "back": {"extrapolation": -0.01},
    "tensors": {"lr": torch.tensor(0.02, dtype=torch.float64), "betas": (torch.tensor(0.75), 0.9)},
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""Without float16, which takes `state_bits`: see test_extrapolation_errors.py."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_formula(dtype: torch.dtype, name: str) -> None:
    options = ADAMW | {"extrapolation": E} | SETTINGS[name]
    params = parameters(dtype)
    opt, formula = ef.AdamW(params, **options), Formula(params, **options)
    e = options["extrapolation"]
    for _ in range(12):
        train(opt, params, 1)
        formula.step(e)
    assert distance(params, formula.y(e)) <= TOLERANCES[dtype]
    if dtype.itemsize > 2:  # the formula's two points lie apart
        assert distance(params, formula.x) > 2 * TOLERANCES[dtype]
    opt.eval()
    assert distance(params, formula.x) <= TOLERANCES[dtype]
    opt.train()
    assert distance(params, formula.y(e)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("state_bits", [8, 16, 32])
def test_second_moments_that_float16_does_not_hold(state_bits: int) -> None:
    """Squared gradients of 1e-9: only u, which has size 1, shows at y."""
    x = nn.Parameter(torch.ones(640, dtype=torch.float16))
    formats = {"master_weight_bits": 32, "state_bits": state_bits}
    opt = ef.AdamW([x], lr=0.0, eps=1e-12, weight_decay=0.0, extrapolation=E, **formats)
    for _ in range(5):
        x.grad = torch.full_like(x, 3e-5)
        opt.step()
    assert (opt.master_weights()[0] - (1 - E)).abs().max() < 0.05 * E
    opt.eval()
    assert (opt.master_weights()[0] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_the_reference_gives_the_same_bits(
    dtype: torch.dtype, stochastic: bool, rho: float
) -> None:
    results = []
    for backend in (None, "reference"):
        params = parameters(dtype)
        options = ADAMW | {"stochastic_rounding": stochastic, "backend": backend, "rho": rho}
        opt = ef.AdamW(params, extrapolation=E, **options | {"weight_decay": 0.1})
        for _ in range(2):
            for _ in range(5):
                opt.step(lambda params=params: set_gradients(params))
            opt.eval()
            opt.train()
        results.append(params)
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_x_is_had_back_to_rounding(dtype: torch.dtype, steps: int) -> None:
    """Also where moments are rounded: u is that of what is stored."""
    x = nn.Parameter(torch.linspace(0.5, 3.0, 1000).to(dtype))
    opt = ef.AdamW([x], lr=0.0, betas=(0.8, 0.95), eps=0.03, weight_decay=0.0, extrapolation=E)
    start = x.detach().double().clone()
    gen = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x.grad = torch.randn(1000, generator=gen).to(dtype)
        opt.step()
        assert (x.detach().double() - start).abs().max() > 0.02
    opt.eval()
    unit = torch.finfo(dtype).eps / 2
    assert ((x.detach().double() - start).abs() <= (steps + 1.1) * unit * 2 * start).all()


def test_no_extrapolation_is_adamw_to_the_bit() -> None:
    results = []
    for options in ({}, {"extrapolation": 0.0}, {"extrapolation": None}):
        params = parameters(torch.float32)
        opt = ef.AdamW(params, **ADAMW, **options)
        train(opt, params, 5)
        opt.eval()  # as a framework does with every optimizer that has it
        opt.step()
        results.append(params)
    assert all(map(same_bits, results[0], results[1]))
    assert all(map(same_bits, results[0], results[2]))


def test_the_first_moment_of_a_fixed_preconditioner_is_heavy_balls() -> None:
    """With an eps far above the gradients, and the first moment's bias gone."""
    eps, beta = 1e12, 0.8
    options: dict[str, Any] = {"betas": (beta, 0.9), "eps": eps, "weight_decay": 0.0}
    x, y = (nn.Parameter(torch.linspace(1.0, 2.0, 7, dtype=torch.float64)) for _ in range(2))
    adamw = ef.AdamW([x], lr=1e9, extrapolation=2e9, **options)
    sgd = ef.SGD([y], lr=1e-3, momentum=beta, dampening=beta, extrapolation=2e-3)
    for p, opt in ((x, adamw), (y, sgd)):
        p.grad = torch.ones_like(p)
        opt.step()
        state = opt.state[p]
        for name in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
            state[name].fill_(0.25)
        if "step" in state:
            state["step"].fill_(1000.0)
    with torch.no_grad():
        x.copy_(y)
    for _ in range(20):
        for p, opt in ((x, adamw), (y, sgd)):
            p.grad = gradient(p.detach())
            opt.step()
    torch.testing.assert_close(x, y, rtol=1e-9, atol=0.0)


def test_a_step_after_eval_is_adamws_and_leaves_y() -> None:
    params = parameters()
    opt, formula = ef.AdamW(params, **ADAMW, extrapolation=E), Formula(params)
    train(opt, params, 2)
    for _ in range(2):
        formula.step(E)
    opt.eval()
    opt.eval()
    assert distance(params, formula.x) < 1e-14
    train(opt, params, 1)
    formula.step(0.0)
    assert distance(params, formula.y(E)) < 1e-14


def test_eval_within_a_step_is_refused() -> None:
    params = parameters()
    opt = ef.AdamW(params, **ADAMW, rho=0.05, extrapolation=E)
    opt.step(lambda: set_gradients(params))
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"eval\(\) was called by the closure"):
        opt.step(opt.eval)
    assert all(map(same_bits, before, params))
    set_gradients(params)
    assert opt.ascend()
    opt.train()  # as frameworks call before every evaluation: nothing is to be done
    with pytest.raises(RuntimeError, match=r"eval\(\) while the parameters are perturbed"):
        opt.eval()
    opt.restore()
    assert all(map(same_bits, before, params))


def test_a_checkpoint_of_torchs_holds_x() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params, **ADAMW)
    train(theirs, params, 3)
    formula = Formula(params)
    formula.steps = 3
    formula.m, formula.v = (
        [theirs.state[p][name].clone() for p in params] for name in ("exp_avg", "exp_avg_sq")
    )
    opt = ef.AdamW(params, **ADAMW, extrapolation=E)
    opt.load_state_dict(theirs.state_dict())
    assert distance(params, formula.x) == 0
    opt.train()
    assert distance(params, formula.y(E)) < 1e-14
    train(opt, params, 4)
    for _ in range(4):
        formula.step(E)
    opt.eval()
    assert distance(params, formula.x) < 1e-14
    theirs.load_state_dict(opt.state_dict())
    train(theirs, params, 1)
    formula.step(0.0)
    assert distance(params, formula.x) < 1e-14


def test_a_change_takes_effect_with_the_next_gradient() -> None:
    params = parameters()
    opt, formula = ef.AdamW(params, **ADAMW, extrapolation=E), Formula(params)
    train(opt, params, 3)
    for _ in range(3):
        formula.step(E)
    for e in (0.03, -0.01, 0.0, E):
        opt.param_groups[0]["extrapolation"] = e
        opt.train()  # takes it into effect at once
        assert distance(params, formula.y(e)) < 1e-14
        train(opt, params, 2)
        formula.step(e)
        formula.step(e)
    opt.param_groups[0].update(extrapolation=0.02)
    train(opt, params, 1)  # the gradient is still that at the old y
    formula.step(E)
    assert distance(params, formula.y(0.02)) < 1e-14


def test_a_change_before_the_first_step() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    opt, formula = ef.AdamW(params, **ADAMW, extrapolation=E), Formula(params)
    opt.param_groups[0]["extrapolation"] = 0.02
    opt.train()
    assert all(map(same_bits, before, params))
    train(opt, params, 1)
    formula.step(E)
    assert distance(params, formula.y(0.02)) < 1e-14


def test_skipped_steps_count_for_nothing() -> None:
    """Neither the first, which leaves a step count of 0, nor later ones; also across a change."""
    results = []
    for skips in ((), (0, 2, 5)):
        params = parameters(torch.float32)
        opt = ef.AdamW(params, **ADAMW, extrapolation=E, skip_nonfinite=True)
        for step in range(6):
            if step in skips:
                set_gradients(params)
                assert params[0].grad is not None
                params[0].grad[0, 0] = math.inf
                before = [p.detach().clone() for p in params]
                opt.param_groups[0]["extrapolation"] = 0.01
                opt.step()
                assert opt.param_groups[0]["extrapolated"] == E
                opt.param_groups[0]["extrapolation"] = E
                opt.eval()
                opt.train()
                if step == 0:
                    assert all(map(same_bits, before, params))
                with torch.no_grad():
                    for p, q in zip(params, before, strict=True):
                        p.copy_(q)  # a round trip may change the last bit
            train(opt, params, 1)
        assert opt.skipped == len(skips)
        results.append(params)
    assert all(map(same_bits, *results))


def test_parameters_that_have_no_gradient_at_times() -> None:
    """Each has its own number of steps, and some have none yet when e changes."""
    params = parameters()
    opt, formulas = ef.AdamW(params, **ADAMW, extrapolation=E), [Formula([p]) for p in params]
    e = E
    for step in range(8):
        set_gradients(params)
        params[step % 3].grad = None
        if step in (0, 4):
            opt.param_groups[0]["extrapolation"] = 0.02 + 0.01 * step
        opt.step()
        for i, formula in enumerate(formulas):
            if i != step % 3:
                formula.step(e)
        e = opt.param_groups[0]["extrapolation"]
        for p, formula in zip(params, formulas, strict=True):
            assert distance([p], formula.y(e)) < 1e-14
    opt.eval()
    for p, formula in zip(params, formulas, strict=True):
        assert distance([p], formula.x) < 1e-14


def test_gradients_released_in_backward() -> None:
    results = []
    for release in (False, True):
        params = parameters(torch.float32)
        opt = ef.AdamW(params, **ADAMW, extrapolation=E, release_gradients=release)

        def closure(opt: torch.optim.Optimizer = opt, params: list = params) -> Tensor:
            opt.zero_grad()
            loss = loss_of(params)
            loss.backward()
            return loss

        for _ in range(5):
            opt.step(closure)
        results.append(params)
    assert all(map(same_bits, *results))


def test_another_layout_in_between_changes_all_or_nothing() -> None:
    """The parameter whose layout has changed is not the first."""
    params = [nn.Parameter(p.detach().clone()) for p in reversed(parameters())]
    opt, formula = ef.AdamW(params, **ADAMW, extrapolation=E), Formula(params)
    train(opt, params, 2)
    formula.step(E)
    formula.step(E)
    params[2].data = params[2].data.t().contiguous().t()
    opt.eval()
    assert distance(params, formula.x) < 1e-14
    opt.train()
    train(opt, params, 2)
    formula.step(E)
    formula.step(E)
    assert distance(params, formula.y(E)) < 1e-14
    assert params[2].is_contiguous() is False


def test_an_ascent_from_y() -> None:
    """The gradient is taken where USAM's ascent from y leads."""
    params, rho = parameters(), 0.05
    formula = Formula(params, weight_decay=0.1)
    options = ADAMW | {"weight_decay": 0.1, "extrapolation": E}
    opt = ef.AdamW(params, **options, rho=rho)
    for _ in range(3):
        opt.step(lambda: set_gradients(params))
        formula.step(E, rho)
        assert distance(params, formula.y(E)) < 1e-14
    opt.eval()
    assert distance(params, formula.x) < 1e-14
    [flt] = ef.filters.of(opt)
    assert flt == ef.filters.AdamW(0.02, 0.8, 0.1, E)


def test_the_wanted_edge_of_groups() -> None:
    params = parameters()
    opt = ef.AdamW(params[:1], **ADAMW, max_eigenvalue=120.0)
    opt.add_param_group({"params": params[1:2], "lr": 0.03, "weight_decay": 0.5})
    opt.add_param_group({"params": params[2:], "betas": (0.5, 0.9), "max_eigenvalue": 50.0})
    edges = [flt.max_eigenvalue() for flt in ef.filters.of(opt)]
    assert edges == pytest.approx([120.0, 120.0, 50.0])
    assert all(group["extrapolation"] > 0 for group in opt.param_groups)
    assert not any("max_eigenvalue" in group for group in opt.param_groups)
    with pytest.raises(ValueError, match="give one of them"):
        ef.AdamW([{"params": params, "extrapolation": 0.5, "max_eigenvalue": 9.0}], **ADAMW)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"extrapolation": math.inf}, ValueError, "must be finite, and is inf"),
        ({"extrapolation": "far"}, TypeError, "must be a number, and is 'far'"),
        ({"extrapolation": torch.tensor(0.1)}, TypeError, "must be a number"),
        ({"extrapolation": 0.1, "max_eigenvalue": 9.0}, ValueError, "give one of them"),
        ({"max_eigenvalue": 1e9}, ValueError, "lr = 0.02 alone puts the edge"),
        ({"max_eigenvalue": -1.0}, ValueError, "max_eigenvalue must be positive"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ef.AdamW(parameters(), **ADAMW, **options)


@pytest.mark.parametrize("e", [E, -0.01])
@pytest.mark.parametrize("rho", [0.0, 0.01])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_it_obeys_its_edge(factor: float, rho: float, e: float) -> None:
    """On a quadratic, with a preconditioner that stays at eps, beside p(lambda) of an ascent."""
    eps, lr, decay = 1e4, 0.02, 0.5
    edge = ef.filters.AdamW(lr, 0.8, decay, e).max_eigenvalue()
    curvature = factor * edge * eps
    lam = 2 * curvature / (1 + math.sqrt(1 + 4 * rho * curvature))  # lam (1 + rho lam)
    x = nn.Parameter(torch.tensor([1e-20], dtype=torch.float64))
    opt = ef.AdamW(
        [x], lr=lr, betas=(0.8, 0.999), eps=eps, weight_decay=decay, rho=rho, extrapolation=e
    )

    def closure() -> None:
        x.grad = lam * x.detach()

    for _ in range(400):
        opt.step(closure)
    assert bool(x.abs() < 1e-20) == (factor < 1)
