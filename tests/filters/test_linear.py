"""Linear recursions: known cases in closed form, and the spectral radius as the oracle."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eigenfilter.filters import HeavyBall, Linear, Nesterov


@given(st.floats(0.01, 0.99), st.floats(0.01, 1.0), st.floats(0.0, 0.5))
def test_heavy_ball_and_nesterov_are_linear(beta: float, lr: float, decay: float) -> None:
    a = 1.0 - lr * decay
    heavy = Linear([[a + beta, -beta], [1.0, 0.0]], lr)
    assert np.allclose(heavy.intervals(), HeavyBall(lr, beta, 0.0, decay).intervals(), atol=1e-7)
    # In (x, lr m): m <- beta m + d, x <- x - lr (d + beta m), d = g + decay x.
    d = lr * decay
    nesterov = Linear([[1 - d - beta * d, -beta * beta], [d, beta]], lr, [1.0 + beta, -1.0])
    expected = Nesterov(lr, beta, 0.0, decay).intervals()
    assert np.allclose(nesterov.intervals(), expected, rtol=1e-6, atol=1e-7)


@given(
    st.integers(1, 4).flatmap(
        lambda s: st.tuples(
            st.lists(st.floats(-1.2, 1.2), min_size=s * s, max_size=s * s),
            st.lists(st.floats(-1.0, 1.0), min_size=s, max_size=s),
        )
    ),
    st.floats(0.05, 2.0),
)
def test_the_radius_is_at_most_1_inside_and_above_it_outside(
    entries: tuple[list[float], list[float]], lr: float
) -> None:
    flat, B = entries
    D = np.reshape(flat, (len(B), len(B)))
    flt = Linear(D, lr, B)
    ends = [end for interval in flt.intervals() for end in interval]
    cuts = [-math.inf, *ends, math.inf]
    for low, high in pairwise(cuts):
        left, right = max(low, -100.0), min(high, 100.0)
        if right - left < 1e-3:
            continue
        for lam in np.linspace(left, right, 9)[1:-1]:
            radius = float(flt.spectral_radius(lam))
            if abs(radius - 1.0) > 1e-5:
                assert bool(flt.admits(lam)) == (radius < 1.0)


@pytest.mark.parametrize(
    ("D", "admitted", "refused"),
    [
        (np.eye(2), [0.1, 3.9], [-3.0, 4.1]),
        (np.diag([1.0, -1.0]), [0.1, 3.9], [-0.1, 9.0]),
        ([[0.5, 0.0, -0.5], [-0.5, -1.0, -0.5], [0.5, 0.0, 0.0]], [0.0, 1.0], [-2.0, 100.0]),
    ],
)
def test_states_that_stay_as_they_are(D: object, admitted: list, refused: list) -> None:
    """Some roots lie on the unit circle whatever lambda is."""
    flt = Linear(D, 0.5)
    assert flt.admits(admitted).all()
    assert not flt.admits(refused).any()
    assert (flt.spectral_radius(admitted) < 1 + 1e-9).all()
    assert (flt.spectral_radius(refused) > 1 + 1e-9).all()


def test_inputs_may_change_afterwards() -> None:
    D = np.array([[0.9]])
    flt = Linear(D, 0.2)
    D[:] = 5.0
    assert flt.max_eigenvalue() == pytest.approx(9.5)


def test_a_number_is_gradient_descent_with_decoupled_decay() -> None:
    assert Linear(0.9, 0.2).intervals() == [pytest.approx((-0.5, 9.5))]
    assert Linear(0.9, 0.2).max_eigenvalue() == pytest.approx(9.5)
    assert Linear(1.0, 0.5).admits([-0.1, 0.0, 4.0, 4.1]).tolist() == [False, True, True, False]


def test_what_never_contracts_admits_nothing() -> None:
    """A second state grows by itself, whatever lambda is."""
    assert Linear([[0.5, 0.0], [0.0, 2.0]], 0.1).intervals() == []
    assert Linear([[0.5, 0.0], [0.0, 2.0]], 0.1).max_eigenvalue() == -math.inf


def test_a_gradient_that_is_not_taken_filters_nothing() -> None:
    assert Linear(0.5, 0.1, [0.0]).intervals() == [(-math.inf, math.inf)]
    assert Linear(1.5, 0.1, [0.0]).intervals() == []


def test_the_recurrence_agrees() -> None:
    """An optimizer of three states: heavy ball on the mean of two momenta."""
    D = [[1.0, -0.25, -0.45], [0.0, 0.5, 0.0], [0.0, 0.0, 0.9]]
    flt = Linear(D, 0.1, [1.0, -1.0, -1.0])
    for low, high in flt.intervals():
        for lam, converges in ((high * 0.99, True), (high * 1.01, False), (low + 0.1, True)):
            z = np.ones(3)
            for _ in range(4000):
                z = np.asarray(D) @ z - 0.1 * lam * z[0] * np.array([1.0, -1.0, -1.0])
                if abs(z).max() > 1e6:
                    break
            assert bool(abs(z).max() < 1e-3) == converges


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([[1.0, 0.0]], 0.1), r"\[s, s\]"),
        ((1.0, 0.1, [1.0, 0.0]), r"B \[s\]"),
        ((math.nan, 0.1), "finite"),
        ((1.0, 0.0), "lr must be positive"),
        ((1.0, -1.0), "lr"),
        ((np.zeros((0, 0)), 1.0), "s >= 1"),
    ],
)
def test_bad_values(arguments: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Linear(*arguments)
    with pytest.raises(ValueError, match="finite eigenvalues"):
        Linear(1.0, 0.1).spectral_radius(math.inf)
