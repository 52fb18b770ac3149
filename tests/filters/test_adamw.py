"""AdamW's edge against LAPACK, and against AdamW itself on a quadratic."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eigenfilter as ef
from eigenfilter import filters


@st.composite
def adamws(draw: st.DrawFn) -> filters.AdamW:
    """Draw extrapolations ahead and back, of every size beside lr."""
    lr = 10.0 ** draw(st.floats(-6, 2))
    beta1, decay = draw(st.floats(0.0, 0.99)), draw(st.floats(0.0, 1.9)) / lr
    sizes = st.floats(-3, 3).map(lambda e: 10.0**e)
    e = draw(st.one_of(st.just(0.0), sizes, sizes.map(lambda size: -size)))
    return filters.AdamW(lr, beta1, decay, e * lr, maximize=draw(st.booleans()))


@given(adamws())
def test_edges_are_where_the_spectral_radius_crosses_one(flt: filters.AdamW) -> None:
    [(low, high)] = flt.intervals()
    inside = np.array([0.999 * low + 0.001 * high, 0.001 * low + 0.999 * high])
    outside = np.array([low - 0.001 * (high - low), high + 0.001 * (high - low)])
    assert (flt.spectral_radius(inside) < 1 + 1e-12).all()
    assert (flt.spectral_radius(outside) > 1 - 1e-12).all()
    assert flt.admits([low, high]).all()


@given(adamws(), st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=8))
def test_admits_agrees_with_the_recurrence(flt: filters.AdamW, units: list[float]) -> None:
    """By the definition, from which the filter's block was derived: y, then u, then x."""
    mu = np.array(units) * max(map(abs, flt.intervals()[0]))
    x, u, grown = np.ones_like(mu), np.zeros_like(mu), np.zeros_like(mu)
    for step in range(600):
        y = x - flt.extrapolation * u
        gradient = -mu * y if flt.maximize else mu * y
        u = flt.beta1 * u + (1.0 - flt.beta1) * gradient
        x = x - flt.lr * u - flt.lr * flt.weight_decay * y
        size = np.hypot(x, flt.lr * u)
        size[size == 0.0] = 1.0
        x, u = x / size, u / size
        grown += np.log(size) if step >= 300 else 0.0
    decided = np.abs(grown) > 5.0
    np.testing.assert_array_equal(flt.admits(mu)[decided], (grown < 0.0)[decided])
    assert decided[np.abs(flt.spectral_radius(mu) - 1.0) > 0.03].all()


@given(st.floats(-4, 1).map(lambda e: 10.0**e), st.floats(0.01, 0.99), st.floats(-20.0, 20.0))
def test_without_decay_it_is_heavy_ball_with_dampening(lr: float, beta: float, e: float) -> None:
    """With momentum and dampening beta1, on both edges."""
    flt = filters.AdamW(lr, beta, extrapolation=e * lr)
    heavy = filters.HeavyBall(lr, beta, beta, extrapolation=e * lr)
    [interval], [expected] = flt.intervals(), heavy.intervals()
    assert interval == pytest.approx(expected, rel=1e-12)
    mu = np.linspace(-1.0, 2.0, 7) * interval[1]
    np.testing.assert_allclose(flt.spectral_radius(mu), heavy.spectral_radius(mu), rtol=1e-7)
    assert flt.rate == pytest.approx(heavy.rate)
    assert flt.composes == heavy.composes


def edge_by_bisection(flt: filters.AdamW) -> float:
    """Where the spectral radius passes 1, from a small eigenvalue upwards."""
    inside = 1e-6 / max(flt.lr, abs(flt.extrapolation))
    outside = inside
    while flt.spectral_radius(outside) <= 1.0 + 1e-13:
        outside *= 2.0
    for _ in range(60):
        middle = 0.5 * (inside + outside)
        is_inside = flt.spectral_radius(middle) <= 1.0 + 1e-13
        inside, outside = (middle, outside) if is_inside else (inside, middle)
    return inside


@given(st.floats(0.0, 0.95), st.floats(0.0, 1.9), st.floats(-2.0, 5.0))
def test_the_rate_gives_the_edge(beta1: float, decay: float, e: float) -> None:
    """With `edge_decay` where the filter composes, and of no decay elsewhere."""
    flt = filters.AdamW(0.3, beta1, decay / 0.3, 0.3 * e)
    if flt.composes:
        assert 2.0 / flt.rate - flt.edge_decay == pytest.approx(edge_by_bisection(flt), rel=1e-5)
    else:
        plain = dataclasses.replace(flt, weight_decay=0.0)
        assert 2.0 / flt.rate == pytest.approx(edge_by_bisection(plain), rel=1e-5)


def test_the_rate_of_one_that_looks_back_and_decays() -> None:
    """The complex multipliers would decide without the decay, and do not with it."""
    flt = filters.AdamW(1.0, 0.9, 0.5, -0.1)
    assert flt.composes
    assert flt.rate == pytest.approx(0.1 * (1.0 - 0.2) / 1.9)
    assert flt.edge_decay == pytest.approx(0.5 / flt.rate)
    assert flt.max_eigenvalue() == pytest.approx(edge_by_bisection(flt))


def test_known_edges_of_an_extrapolation() -> None:
    ahead = filters.AdamW(0.1, 0.5, 0.4, 0.3)
    assert ahead.max_eigenvalue() == pytest.approx(1.5 * (2 - 0.04) / (0.5 * 0.7))
    assert filters.AdamW(0.1, 0.5, 0.4, -0.04).max_eigenvalue() == pytest.approx(
        (1 - 0.5 * 0.96) / (0.5 * 0.04)  # a complex pair of multipliers leaves the unit circle
    )
    # A decay of y that is far ahead of x is a gradient, too, and the pair may leave at the low end.
    far = filters.AdamW(0.1, 0.5, 2.0, 3.0)
    assert far.intervals()[0][0] == pytest.approx(-(1 - 0.5 * 0.8) / (0.5 * 3.0))
    assert (ahead.composes, far.composes) == (True, False)
    assert filters.AdamW(0.0, 0.5, extrapolation=0.3).intervals() == [
        (pytest.approx(-0.5 / 0.15), pytest.approx(1.5 * 2 / (0.5 * 0.6)))
    ]


@pytest.mark.parametrize(("lr", "decay"), [(0.02, 0.0), (0.05, 2.0)])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_adamw_with_a_fixed_preconditioner_obeys_it(lr: float, decay: float, factor: float) -> None:
    """eps far above sqrt(v) makes P the constant eps, up to beta1^t, which vanishes.

    Its first steps are long, and take x some 3,000 times further away.
    """
    eps, beta1 = 1e4, 0.8
    edge = filters.AdamW(lr, beta1, decay).max_eigenvalue()
    lam = factor * edge * eps  # mu = lam / P
    x = torch.nn.Parameter(torch.tensor([1e-20], dtype=torch.float64))
    opt = ef.AdamW([x], lr=lr, betas=(beta1, 0.999), eps=eps, weight_decay=decay)
    for _ in range(200):
        x.grad = lam * x.detach()
        opt.step()
    assert bool(x.abs() < 1e-20) == (factor < 1)


def test_of_adamw() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    for cls in (ef.AdamW, torch.optim.AdamW):
        opt = cls([p], lr=0.01, betas=(0.8, 0.99), weight_decay=0.1)
        assert filters.of(opt) == [filters.AdamW(0.01, 0.8, 0.1)]
    ahead = ef.AdamW([p], lr=0.01, betas=(0.8, 0.99), weight_decay=0.1, extrapolation=0.3)
    assert filters.of(ahead) == [filters.AdamW(0.01, 0.8, 0.1, 0.3)]
    with pytest.raises(TypeError, match="AMSGrad"):
        filters.of(torch.optim.AdamW([p], amsgrad=True))


def test_known_values() -> None:
    assert filters.AdamW(1e-3).intervals() == [(0.0, pytest.approx(38000))]
    assert filters.AdamW(0.0).intervals() == [(-math.inf, math.inf)]
    [(low, high)] = filters.AdamW(0.1, 0.0, 2.0, maximize=True).intervals()
    assert (low, high) == pytest.approx((-18, 2))


@pytest.mark.parametrize(
    "arguments",
    [
        (-1.0,),
        (0.1, 1.0),
        (0.1, -0.1),
        (0.1, 0.9, -1.0),
        (0.1, 0.9, 21.0),
        (0.1, 0.9, 0.0, math.inf),
    ],
)
def test_bad_values(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="must"):
        filters.AdamW(*arguments)
