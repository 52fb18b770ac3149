"""Extrapolated momentum: the parameters hold y = x - e m between steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import same_bits
from optimizers.extrapolated import (
    TOLERANCES,
    distance,
    gradient,
    loss_of,
    parameters,
    set_gradients,
    train,
)

E, LR = 0.08, 0.02
HEAVY: dict[str, Any] = {"lr": LR, "momentum": 0.9}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "dampening": {"dampening": 0.3, "weight_decay": 0.1},
    "maximize": {"maximize": True},
    "back": {"extrapolation": -0.01},
}


class Formula:
    """The method in float64, on x and m."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.x = [p.detach().double().clone() for p in params]
        self.m: list[Tensor] = []

    def y(self, e: float) -> list[Tensor]:
        return [x - e * m for x, m in zip(self.x, self.m, strict=True)] if self.m else self.x

    def step(
        self,
        lr: float,
        momentum: float,
        e: float,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
    ) -> None:
        d = [gradient(y) + weight_decay * y for y in self.y(e)]
        first = not self.m
        self.m = [torch.zeros_like(x) for x in self.x] if first else self.m
        keep = 1.0 if first else 1.0 - dampening
        self.m = [momentum * m + keep * g for m, g in zip(self.m, d, strict=True)]
        self.x = [x - lr * m for x, m in zip(self.x, self.m, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_formula(dtype: torch.dtype, name: str) -> None:
    options = {"extrapolation": E} | SETTINGS[name]
    params = parameters(dtype)
    opt, formula = ef.SGD(params, **HEAVY, **options), Formula(params)
    e = options["extrapolation"]
    rest = {n: options[n] for n in ("weight_decay", "dampening") if n in options}
    for _ in range(12):
        train(opt, params, 1)
        formula.step(**HEAVY, e=e, **rest)
    assert distance(params, formula.y(e)) <= TOLERANCES[dtype]
    if dtype.itemsize > 2:  # the formula's two points lie apart
        assert distance(params, formula.x) > 2 * TOLERANCES[dtype]
    opt.eval()
    assert distance(params, formula.x) <= TOLERANCES[dtype]
    opt.train()
    assert distance(params, formula.y(e)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_reference_gives_the_same_bits(dtype: torch.dtype, stochastic: bool) -> None:
    results = []
    for backend in (None, "reference"):
        params = parameters(dtype)
        options = {"stochastic_rounding": stochastic, "backend": backend}
        opt = ef.SGD(params, **HEAVY, extrapolation=E, weight_decay=0.01, **options)
        train(opt, params, 5)
        opt.eval()
        opt.train()
        train(opt, params, 5)
        results.append(params)
    assert all(map(same_bits, *results))


def test_no_extrapolation_is_heavy_ball_to_the_bit() -> None:
    results = []
    for options in ({}, {"extrapolation": 0.0}, {"extrapolation": None}):
        params = parameters(torch.float32)
        opt = ef.SGD(params, **HEAVY, **options)
        train(opt, params, 5)
        opt.eval()  # as a framework does with every optimizer that has it
        opt.step()
        results.append(params)
    assert all(map(same_bits, results[0], results[1]))
    assert all(map(same_bits, results[0], results[2]))


def test_lr_times_momentum_is_nesterov() -> None:
    """Nesterov's parameters in torch's form are y, not x."""
    ours, theirs = parameters(), parameters()
    opt = ef.SGD(ours, **HEAVY, extrapolation=LR * 0.9)
    train(opt, ours, 20)
    train(torch.optim.SGD(theirs, **HEAVY, nesterov=True), theirs, 20)
    assert distance(ours, [p.detach() for p in theirs]) < 1e-14


def test_a_step_after_eval_is_one_of_heavy_ball_and_leaves_y() -> None:
    params = parameters()
    opt, formula = ef.SGD(params, **HEAVY, extrapolation=E), Formula(params)
    train(opt, params, 2)
    for _ in range(2):
        formula.step(**HEAVY, e=E)
    opt.eval()
    opt.eval()
    assert distance(params, formula.x) < 1e-14
    train(opt, params, 1)
    formula.step(**HEAVY, e=0.0)
    assert distance(params, formula.y(E)) < 1e-14


def test_eval_within_a_closure_is_refused() -> None:
    params = parameters()
    opt = ef.SGD(params, **HEAVY, extrapolation=E)
    train(opt, params, 2)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"eval\(\) was called by the closure"):
        opt.step(opt.eval)
    assert all(map(same_bits, before, params))


def test_a_checkpoint_of_torchs_holds_x() -> None:
    params = parameters()
    theirs = torch.optim.SGD(params, **HEAVY)
    train(theirs, params, 3)
    formula = Formula(params)
    formula.m = [theirs.state[p]["momentum_buffer"].clone() for p in params]
    opt = ef.SGD(params, **HEAVY, extrapolation=E)
    opt.load_state_dict(theirs.state_dict())
    opt.train()
    train(opt, params, 4)
    for _ in range(4):
        formula.step(**HEAVY, e=E)
    opt.eval()
    assert distance(params, formula.x) < 1e-14


def test_a_change_takes_effect_with_the_next_gradient() -> None:
    params = parameters()
    opt, formula = ef.SGD(params, **HEAVY, extrapolation=E), Formula(params)
    train(opt, params, 3)
    for _ in range(3):
        formula.step(**HEAVY, e=E)
    for e in (0.03, -0.01, 0.0, E):
        opt.param_groups[0]["extrapolation"] = e
        opt.train()  # takes it into effect at once
        assert distance(params, formula.y(e)) < 1e-14
        train(opt, params, 2)
        formula.step(**HEAVY, e=e)
        formula.step(**HEAVY, e=e)
    opt.param_groups[0].update(extrapolation=0.02)
    train(opt, params, 1)  # the gradient is still that at the old y
    formula.step(**HEAVY, e=E)
    assert distance(params, formula.y(0.02)) < 1e-14


def test_a_change_with_decay_skipping_and_a_parameter_without_a_gradient() -> None:
    params = parameters()
    opt = ef.SGD(params, **HEAVY, weight_decay=0.1, extrapolation=E, skip_nonfinite=True)
    formulas = [Formula([p]) for p in params]
    train(opt, params, 3)
    for formula in formulas:
        for _ in range(3):
            formula.step(**HEAVY, e=E, weight_decay=0.1)
    opt.param_groups[0]["extrapolation"] = 0.02
    set_gradients(params)
    assert params[0].grad is not None
    params[0].grad[0, 0] = math.inf
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(map(same_bits, before, params))
    assert opt.param_groups[0]["extrapolated"] == E
    set_gradients(params)
    params[1].grad = None
    opt.step()
    for i, formula in enumerate(formulas):
        if i != 1:
            formula.step(**HEAVY, e=E, weight_decay=0.1)
        assert distance([params[i]], formula.y(0.02)) < 1e-14


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_skipped_steps(dampening: float) -> None:
    results = []
    for skips in ((), (0, 2, 5)):
        params = parameters(torch.float32)
        opt = ef.SGD(params, **HEAVY, dampening=dampening, extrapolation=E, skip_nonfinite=True)
        for step in range(6):
            if step in skips:
                set_gradients(params)
                assert params[0].grad is not None
                params[0].grad[0, 0] = math.inf
                opt.step()
            train(opt, params, 1)
        assert opt.skipped == len(skips)
        results.append(params)
    assert all(map(same_bits, *results))


def test_parameters_that_have_no_gradient_at_times() -> None:
    params = parameters()
    opt, formulas = ef.SGD(params, **HEAVY, extrapolation=E), [Formula([p]) for p in params]
    for step in range(8):
        set_gradients(params)
        params[step % 3].grad = None
        opt.step()
        for i, formula in enumerate(formulas):
            if i != step % 3:
                formula.step(**HEAVY, e=E)
    opt.eval()
    for p, formula in zip(params, formulas, strict=True):
        assert distance([p], formula.x) < 1e-14


def test_gradients_released_in_backward() -> None:
    results = []
    for release in (False, True):
        params = parameters(torch.float32)
        opt = ef.SGD(params, **HEAVY, extrapolation=E, release_gradients=release)

        def closure(opt: torch.optim.Optimizer = opt, params: list = params) -> Tensor:
            opt.zero_grad()
            loss = loss_of(params)
            loss.backward()
            return loss

        for _ in range(5):
            opt.step(closure)
        results.append(params)
    assert all(map(same_bits, *results))


def test_another_layout_in_a_later_group() -> None:
    """It is noticed before the first group is written."""
    params = parameters()
    opt = ef.SGD([{"params": params[1:]}, {"params": params[:1]}], **HEAVY, extrapolation=E)
    formula = Formula(params)
    train(opt, params, 2)
    formula.step(**HEAVY, e=E)
    formula.step(**HEAVY, e=E)
    params[0].data = params[0].data.t().contiguous().t()
    opt.eval()
    assert distance(params, formula.x) < 1e-14


def test_an_ascent_around_it() -> None:
    """USAM's gradient at y, and then the base's step: x is where the momentum buffer says."""
    params = parameters()
    base = ef.SGD(params, **HEAVY, extrapolation=E)
    opt, formula = ef.SharpnessAware(base, "usam", rho=0.05), Formula(params)
    for _ in range(3):
        opt.step(lambda: set_gradients(params))
        points = [y + 0.05 * gradient(y) for y in formula.y(E)]
        formula.m = formula.m or [torch.zeros_like(x) for x in formula.x]
        formula.m = [0.9 * m + gradient(z) for m, z in zip(formula.m, points, strict=True)]
        formula.x = [x - LR * m for x, m in zip(formula.x, formula.m, strict=True)]
        assert distance(params, formula.y(E)) < 1e-14
    with pytest.raises(TypeError, match="no filter is known for an ascent from an extrapolated"):
        ef.filters.of(opt)


def test_the_wanted_edge_of_groups() -> None:
    params = parameters()
    opt = ef.SGD(params[:1], **HEAVY, max_eigenvalue=12.0)
    opt.add_param_group({"params": params[1:2], "lr": 0.03})
    opt.add_param_group({"params": params[2:], "max_eigenvalue": 9.0})
    edges = [flt.max_eigenvalue() for flt in ef.filters.of(opt)]
    assert edges == pytest.approx([12.0, 12.0, 9.0])
    mixed = ef.SGD(
        [{"params": params[:1], "extrapolation": 0.5}, {"params": params[1:]}],
        **HEAVY,
        max_eigenvalue=np.float64(12.0),
    )
    assert mixed.param_groups[0]["extrapolation"] == 0.5
    assert type(mixed.param_groups[1]["extrapolation"]) is float
    with pytest.raises(ValueError, match="give one of them"):
        ef.SGD([{"params": params, "extrapolation": 0.5, "max_eigenvalue": 9.0}], **HEAVY)
    assert not any("max_eigenvalue" in group for group in opt.param_groups + mixed.param_groups)


def test_the_wanted_edge() -> None:
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.03, "weight_decay": 0.5}]
    opt = ef.SGD(groups, **HEAVY, max_eigenvalue=12.0)
    assert [flt.max_eigenvalue() for flt in ef.filters.of(opt)] == pytest.approx([12.0, 12.0])
    first, second = (group["extrapolation"] for group in opt.param_groups)
    assert 0 < second < first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"extrapolation": math.inf, "momentum": 0.9}, ValueError, "must be finite, and is inf"),
        ({"extrapolation": "far", "momentum": 0.9}, TypeError, "must be a number, and is 'far'"),
        ({"extrapolation": torch.tensor(0.1), "momentum": 0.9}, TypeError, "must be a number"),
        ({"extrapolation": 0.1}, ValueError, "set momentum > 0, and no nesterov"),
        ({"extrapolation": 0.1, "momentum": 0.9, "nesterov": True}, ValueError, "no nesterov"),
        ({"extrapolation": 0.1, "max_eigenvalue": 9.0}, ValueError, "give one of them"),
        ({"max_eigenvalue": 9.0}, ValueError, "set momentum > 0, and no nesterov"),
        ({"max_eigenvalue": 1e9, "momentum": 0.9}, ValueError, "lr = 0.02 alone puts the edge"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ef.SGD(parameters(), lr=LR, **options)


def test_methods_that_ascend_refuse_it() -> None:
    opt = ef.USAM(parameters()[:2], **HEAVY)
    with pytest.raises(ValueError, match=r"extrapolation is an option of eigenfilter\.SGD"):
        opt.add_param_group({"params": parameters()[2:], "extrapolation": E})


def test_it_settles_at_its_edge() -> None:
    """On f = sum of log cosh, scaled to sharpness L, it converges below the edge and not above."""
    edge = ef.filters.HeavyBall(**HEAVY, extrapolation=E).max_eigenvalue()
    for ratio, converges in ((0.9, True), (1.1, False)):
        x = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
        opt = ef.SGD([x], **HEAVY, extrapolation=E)
        for _ in range(400):
            x.grad = ratio * edge * x.detach().tanh()
            opt.step()
        assert (abs(x.item()) < 1e-6) == converges
    assert np.isclose(edge, 2 * 1.9 / (LR + 2 * E))
