"""The closed intervals against three oracles: LAPACK on the block, the recurrence, the parabola."""

from __future__ import annotations

import doctest
import math
from collections.abc import Generator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

import eigenfilter.filters as filters
from eigenfilter.filters import (
    MSAM,
    SAM,
    USAM,
    AscentFilter,
    Filter,
    HeavyBall,
    HessianUSAM,
    Nesterov,
    TwoStepUSAM,
)
from eigenfilter.filters.stability import preimage, real_roots

FILTERS = [
    HeavyBall(0.2),
    HeavyBall(0.3, 0.9, weight_decay=0.05),
    HeavyBall(0.1, 0.6, 0.3, 0.2),
    HeavyBall(0.1, 0.6, 0.3, 0.2, maximize=True),
    HeavyBall(0.1, 0.9, extrapolation=0.05),
    HeavyBall(0.1, 0.6, 0.3, 0.2, extrapolation=1.0, maximize=True),
    HeavyBall(0.1, 0.2, 0.2, 0.1, extrapolation=-0.03),
    HeavyBall(0.1, 0.1, extrapolation=-0.2),
    MSAM(0.1, 0.8, 0.1, 0.2, rho=0.3, momentum_norm=4.0),
    Nesterov(0.05, 0.9),
    Nesterov(0.4, 0.5, weight_decay=0.1, maximize=True),
    USAM(0.2, rho=0.05),
    USAM(0.2, 0.9, 0.4, rho=0.3),
    USAM(0.1, 0.7, rho=0.1, nesterov=True),
    USAM(0.1, 0.7, weight_decay=0.5, rho=0.1),
    USAM(0.1, 0.7, rho=0.1, nesterov=True, maximize=True),
    SAM(0.1, 0.7, rho=0.2, grad_norm=1.6),
    TwoStepUSAM(0.1, 0.7, ascent="anchored", rho=0.1),
    TwoStepUSAM(0.1, 0.7, weight_decay=0.5, ascent="anchored", rho=0.1, maximize=True),
    TwoStepUSAM(0.1, 0.7, weight_decay=1.0, rho=0.1, nesterov=True),
    HessianUSAM(0.1, 0.7, 0.2, rho=0.003),
    HessianUSAM(0.1, 0.7, weight_decay=0.5, rho=0.01, nesterov=True, maximize=True),
]


State = tuple[np.ndarray, np.ndarray]


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


MOMENTUM = st.one_of(st.just(0.0), st.floats(0.01, 0.99))


@st.composite
def heavy_balls(draw: st.DrawFn) -> Filter:
    lr = draw(powers(-6, 3))
    decay = draw(st.floats(0.0, 3.0)) / lr
    if draw(st.booleans()):
        return Nesterov(lr, draw(st.floats(0.01, 0.99)), 0.0, decay, maximize=draw(st.booleans()))
    momentum, dampening, e = draw(MOMENTUM), draw(st.floats(0.0, 0.95)), 0.0
    if momentum > 0.0 and draw(st.booleans()):
        e = lr * draw(powers(-3, 2)) * draw(st.sampled_from([1.0, -1.0]))
    return HeavyBall(lr, momentum, dampening, decay, e, maximize=draw(st.booleans()))


@st.composite
def usams(draw: st.DrawFn) -> Filter:
    """Draw p from nearly linear to nearly quadratic, with one interval or with two of them."""
    lr, nesterov = draw(powers(-6, 3)), draw(st.booleans())
    rho = lr * draw(powers(-6, 5))
    decay = draw(st.one_of(st.just(0.0), st.floats(0.01, 0.9), st.floats(1.1, 1.4))) / (4.0 * rho)
    momentum = draw(st.floats(0.01, 0.99) if nesterov else MOMENTUM)
    dampening = 0.0 if nesterov else draw(st.floats(0.0, 0.95))
    maximize = draw(st.booleans())
    return USAM(lr, momentum, dampening, decay, rho=rho, nesterov=nesterov, maximize=maximize)


@st.composite
def sams(draw: st.DrawFn) -> Filter:
    """Draw SAM's filters: USAM's at some gradient norm."""
    flt, norm = draw(usams()), draw(powers(-4, 4))
    rest = {"rho": flt.rho * norm, "nesterov": flt.nesterov, "maximize": flt.maximize}
    return SAM(flt.lr, flt.momentum, flt.dampening, flt.weight_decay, grad_norm=norm, **rest)


@st.composite
def cubics(draw: st.DrawFn) -> Filter:
    """Draw p from nearly linear to nearly cubic; decay may exceed the values at turning points."""
    lr, nesterov = draw(powers(-6, 3)), draw(st.booleans())
    momentum = draw(st.floats(0.01, 0.99) if nesterov else MOMENTUM)
    dampening = 0.0 if nesterov else draw(st.floats(0.0, 0.95))
    shape = lr * draw(powers(-6, 5))
    decay = draw(st.one_of(st.just(0.0), st.floats(0.01, 1.4))) / (4.0 * shape)
    rest = {"nesterov": nesterov, "maximize": draw(st.booleans())}
    if draw(st.booleans()):
        return HessianUSAM(lr, momentum, dampening, decay, rho=shape**2, **rest)
    ascent = draw(st.sampled_from(["sequential", "anchored"]))
    return TwoStepUSAM(lr, momentum, dampening, decay, rho=shape, ascent=ascent, **rest)


def astride(flt: Filter, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues just inside and just outside every edge."""
    intervals = flt.intervals()
    gaps = [right[0] - left[1] for left, right in pairwise(intervals)]
    step = fraction * min([high - low for low, high in intervals] + gaps)
    lows, highs = np.array(intervals).T
    inside = np.concatenate([lows + step, highs - step])
    return inside, np.concatenate([lows - step, highs + step])


@given(st.one_of(heavy_balls(), usams()))
def test_each_edge_is_where_the_spectral_radius_crosses_one(flt: Filter) -> None:
    intervals = flt.intervals()
    assume(intervals)
    q_edge = flt.p(flt.max_eigenvalue()) + flt.weight_decay
    bottom = flt.weight_decay - 1.0 / (4.0 * flt.rho) if isinstance(flt, USAM) else 0.0
    assume(q_edge > 1.1 * bottom)  # otherwise the interval is tiny, around the parabola's vertex
    inside, outside = astride(flt, 0.01)
    assert (flt.spectral_radius(inside) < 1.0 - 1e-11).all()
    assert (flt.spectral_radius(outside) > 1.0 + 1e-11).all()
    assert flt.admits(inside).all()
    assert not flt.admits(outside).any()


def anywhere(flt: Filter, units: list[float]) -> np.ndarray:
    """Return eigenvalues that are given in units of the largest edge."""
    ends = [abs(end) for interval in flt.intervals() for end in interval]
    return np.array(units) * max([*ends, 1.0 / flt.lr])


@given(
    st.one_of(heavy_balls(), usams(), sams(), cubics()),
    st.lists(st.floats(-4.0, 4.0), min_size=1, max_size=20),
)
def test_admits_agrees_with_the_spectral_radius_anywhere(flt: Filter, units: list[float]) -> None:
    lam = anywhere(flt, units)
    radius = flt.spectral_radius(lam)
    decided = np.abs(radius - 1.0) > 1e-7
    np.testing.assert_array_equal(flt.admits(lam)[decided], (radius < 1.0)[decided])


def steps_of(flt: Filter, lam: np.ndarray) -> Generator[State, np.ndarray | float, None]:
    """Yield x and lr m after each step on lam x^2 / 2 from x = 1, by the method's definition.

    The caller sends a factor for both after each step, which keeps them from overflowing: the
    recurrence is linear.
    """
    rho = flt.radius if isinstance(flt, AscentFilter) else 0.0
    sign = -1.0 if flt.maximize else 1.0

    def gradient(x: np.ndarray) -> np.ndarray:
        return sign * lam * x

    def perturb(x: np.ndarray) -> np.ndarray:
        """Return the point where the gradient is taken."""
        if isinstance(flt, HessianUSAM):
            return x + rho * lam * sign * gradient(x)
        y = x + rho * gradient(x)
        if isinstance(flt, TwoStepUSAM):
            return (y if flt.ascent == "sequential" else x) + rho * gradient(y)
        return y

    x, ahead = np.ones_like(lam), getattr(flt, "extrapolation", 0.0)
    m: np.ndarray | None = None
    while True:
        y = x if m is None else x - ahead * m
        d = gradient(perturb(y)) + flt.weight_decay * y
        first = m is None or flt.momentum == 0.0
        m = d if first else flt.momentum * m + (1.0 - flt.dampening) * d
        x = x - flt.lr * (d + flt.momentum * m if flt.nesterov else m)
        scale = yield x, flt.lr * m
        x, m = x * scale, m * scale


@pytest.mark.parametrize("flt", FILTERS, ids=repr)
def test_the_recurrence_converges_inside_and_diverges_outside(flt: Filter) -> None:
    inside, outside = astride(flt, 0.02)
    growth = log_growth(flt, np.concatenate([inside, outside]), 1000)
    assert (growth[: len(inside)] < -7.0).all()
    assert (growth[len(inside) :] > 7.0).all()


@given(
    st.one_of(heavy_balls(), usams(), sams(), cubics()),
    st.lists(st.floats(-4.0, 4.0), min_size=1, max_size=8),
)
def test_admits_agrees_with_the_recurrence_anywhere(flt: Filter, units: list[float]) -> None:
    """The recurrence decides only if its state clearly shrinks or grows in 300 steps."""
    lam = anywhere(flt, units)
    growth = log_growth(flt, lam, 300)
    decided = np.abs(growth) > 5.0
    np.testing.assert_array_equal(flt.admits(lam)[decided], (growth < 0.0)[decided])
    radius = flt.spectral_radius(lam)
    assert decided[np.abs(radius - 1.0) > 0.03].all()


def log_growth(flt: Filter, lam: np.ndarray, steps: int) -> np.ndarray:
    """Return by how much log |(x, lr m)| grows from step `steps` to step `2 * steps`."""
    recurrence = steps_of(flt, lam)
    state, total = next(recurrence), np.zeros_like(lam)
    for step in range(2 * steps):
        size = np.hypot(*state)
        arrived = size == 0.0
        size[arrived] = 1.0  # the state is zero, and stays so
        if step >= steps:
            total += np.log(size)
            total[arrived] = -np.inf
        state = recurrence.send(1.0 / size)
    return total


@given(st.one_of(heavy_balls(), usams(), sams(), cubics()))
def test_the_spectral_radius_is_one_at_every_edge(flt: Filter) -> None:
    ends = np.array([end for interval in flt.intervals() for end in interval])
    np.testing.assert_allclose(flt.spectral_radius(ends), 1.0, rtol=0.0, atol=1e-7)


@given(usams())
def test_usam_edges_solve_the_parabola(flt: USAM) -> None:
    gain = flt.lr * (1.0 - flt.dampening if flt.momentum > 0.0 else 1.0)
    beta = flt.momentum
    edge = 2.0 * (1.0 + beta) / (1.0 + 2.0 * beta if flt.nesterov else 1.0)
    level = edge / gain - flt.weight_decay
    assume(1.0 + 4.0 * flt.rho * level > 0.01)
    root = math.sqrt(1.0 + 4.0 * flt.rho * level)
    ends = [2.0 * level / (1.0 + root), -(1.0 + root) / (2.0 * flt.rho)]
    if flt.maximize:
        ends = [-end for end in ends]
    intervals = flt.intervals()
    assert [intervals[0][0], intervals[-1][1]] == pytest.approx(sorted(ends), rel=1e-12)


def test_known_values() -> None:
    assert HeavyBall(0.2).intervals() == [(0.0, 10.0)]
    assert HeavyBall(0.2, maximize=True).intervals() == [(-10.0, 0.0)]
    assert HeavyBall(0.2, dampening=0.5).max_eigenvalue() == 10.0  # torch: only with momentum
    assert HeavyBall(0.5, 0.5, 0.5, 1.0).intervals() == [(-1.0, 11.0)]
    assert Nesterov(0.5, 0.5).intervals() == [(0.0, 3.0)]
    below, above = USAM(0.2, rho=0.05).intervals()
    assert below == pytest.approx((-27.3205080757, -20.0))
    assert above == pytest.approx((0.0, 7.3205080757))


def test_known_edges_of_extrapolated_momentum() -> None:
    assert HeavyBall(0.05, 0.9, extrapolation=0.165).max_eigenvalue() == pytest.approx(10.0)
    assert HeavyBall(0.05, 0.9, extrapolation=0.0575).max_eigenvalue() == pytest.approx(23.03, 1e-3)
    behind = HeavyBall(0.05, 0.9, extrapolation=-0.01)
    assert behind.max_eigenvalue() == pytest.approx(10.0)
    multipliers = np.linalg.eigvals([[1 - 0.05 * 10, -0.05 * (0.9 + 0.1)], [10, 0.9 + 0.1]])
    assert np.abs(multipliers.imag).min() > 0.1  # a pair leaves the unit circle
    beta, lr = 0.7, 0.3
    assert HeavyBall(lr, beta, extrapolation=lr * beta).intervals() == [
        pytest.approx(interval) for interval in Nesterov(lr, beta).intervals()
    ]


@pytest.mark.parametrize("nesterov", [False, True])
def test_usam_without_rho_is_heavy_ball(nesterov: bool) -> None:
    plain = Nesterov if nesterov else HeavyBall
    usam = USAM(0.3, 0.8, weight_decay=0.1, rho=0.0, nesterov=nesterov)
    assert usam.intervals() == plain(0.3, 0.8, weight_decay=0.1).intervals()


@pytest.mark.parametrize("rho", [0.05, 0.07, 0.3, 1e-7])
def test_touching_intervals_are_merged(rho: float) -> None:
    meeting = 1.0 / (4.0 * rho)
    decays = (meeting * factor for factor in (0.998, 1.0, 1.002))
    apart, touching, past = (USAM(0.2 * rho, rho=rho, weight_decay=wd) for wd in decays)
    assert len(apart.intervals()) == 2
    assert len(touching.intervals()) == len(past.intervals()) == 1
    assert touching.admits(-1.0 / (2.0 * rho))


def test_nothing_moves_so_everything_is_admitted() -> None:
    for flt in (HeavyBall(0.0), USAM(0.0, rho=0.1), HeavyBall(0.1, 0.9, 1.0)):
        assert flt.intervals() == [(-math.inf, math.inf)]
        assert flt.max_eigenvalue() == math.inf
        assert flt.admits([-1e9, 1e9]).all()
        assert flt.spectral_radius([-1e9, 1e9]) == pytest.approx(1.0)


def test_decay_beyond_the_edge_admits_nothing() -> None:
    flt = USAM(2.0, rho=1.0, weight_decay=5.0)
    assert flt.intervals() == []
    assert flt.max_eigenvalue() == -math.inf
    assert (flt.spectral_radius(np.linspace(-100.0, 100.0, 10001)) > 1.0).all()


def test_shapes_and_nan() -> None:
    flt = USAM(0.2, 0.5, rho=0.05)
    lam = np.linspace(-30.0, 10.0, 12).reshape(3, 4)
    assert flt.admits(lam).shape == flt.spectral_radius(lam).shape == flt.p(lam).shape == (3, 4)
    assert flt.admits(1.0).shape == flt.spectral_radius(1.0).shape == flt.p(1.0).shape == ()
    assert not flt.admits(math.nan)
    assert flt.admits(flt.max_eigenvalue())
    for bad in (math.nan, math.inf, 1e200):
        with pytest.raises(ValueError, match="finite"):
            flt.spectral_radius([1.0, bad])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HeavyBall(-0.1), r"lr must lie in \[0, inf\)"),
        (lambda: HeavyBall(math.nan), "lr must lie in"),
        (lambda: HeavyBall(math.inf), "lr must lie in"),
        (lambda: HeavyBall(0.1, 1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: HeavyBall(0.1, -0.1), "momentum must lie in"),
        (lambda: HeavyBall(0.1, 0.9, 1.1), r"dampening must lie in \[0, 1\]"),
        (lambda: HeavyBall(0.1, weight_decay=-1.0), "weight_decay must lie in"),
        (lambda: USAM(0.1, rho=-0.1), "rho must lie in"),
        (lambda: USAM(0.1, rho=math.nan), "rho must lie in"),
        (lambda: Nesterov(0.1, 0.0), "momentum > 0 and dampening = 0"),
        (lambda: Nesterov(0.1, 0.9, 0.1), "or use heavy ball"),
        (lambda: USAM(0.1, rho=0.1, nesterov=True), "momentum > 0"),
        (lambda: HeavyBall(0.1, extrapolation=0.1), "set momentum > 0, and no nesterov"),
        (lambda: Nesterov(0.1, 0.9, extrapolation=0.1), "set momentum > 0, and no nesterov"),
        (lambda: HeavyBall(0.1, 0.9, extrapolation=math.nan), "extrapolation must lie in"),
    ],
)
def test_values_out_of_range(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@given(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=4, unique=True))
def test_real_roots_finds_every_root(roots: list[float]) -> None:
    roots = sorted(roots)
    assume(all(right - left > 1e-2 for left, right in pairwise(roots)))
    output = real_roots(Polynomial.fromroots(roots).coef.tolist())
    assert output == pytest.approx(roots, rel=1e-9, abs=1e-9)


def test_real_roots_far_apart_and_double() -> None:
    assert real_roots([-1e-9, 1.0, 1e9]) == pytest.approx([-1.61803398875e-9, 0.61803398875e-9])
    assert real_roots([1e-9, -1.0, 1e-9]) == pytest.approx([1e-9, 1e9], rel=1e-12)
    assert real_roots([1.0, 2.0, 1.0]) == [-1.0]
    assert real_roots([1.0, 0.0, 1.0]) == []


@pytest.mark.parametrize("rho", [0.1, 0.317, 0.812, 1e-7, 0.8459776330097977, 0.41088479607591016])
def test_preimage_of_a_cubic_keeps_the_isolated_point(rho: float) -> None:
    # x (1 + rho x)^2 touches zero at -1 / rho
    (point, again), interval = preimage([0.0, 1.0, 2.0 * rho, rho * rho], 0.0, 5.0)
    assert point == again == pytest.approx(-1.0 / rho)
    assert interval[0] == 0.0
    assert interval[1] * (1.0 + rho * interval[1]) ** 2 == pytest.approx(5.0)


def test_docstring_examples() -> None:
    for module in (filters, filters.methods):
        result = doctest.testmod(module, extraglobs={"HeavyBall": HeavyBall, "USAM": USAM})
        assert result.attempted > 0
        assert result.failed == 0
