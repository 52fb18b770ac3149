"""Groups that differ, by the rates of their filters: against the whole companion matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eigenfilter import filters

N = 4


# In units of lr: none; up to some that look so far back or ahead that they do not compose.
EXTRAPOLATIONS = st.one_of(st.just(0.0), st.floats(-0.3, 5.0), st.floats(0.0, 100.0))


@st.composite
def momenta(draw: st.DrawFn) -> filters.HeavyBall:
    lr, beta = 10.0 ** draw(st.floats(-1.5, 0.3)), draw(st.floats(0.05, 0.95))
    decay = draw(st.sampled_from([0.0, 0.3]))
    match draw(st.sampled_from(["plain", "heavy ball", "Nesterov"])):
        case "plain":
            return filters.HeavyBall(lr, 0.0, 0.0, decay)
        case "heavy ball":
            rest = beta, draw(st.floats(0.0, 0.9)), decay
            flt = filters.HeavyBall(lr, *rest, lr * draw(EXTRAPOLATIONS))
            assume(flt.composes)
            return flt
        case _:
            return filters.Nesterov(lr, beta, 0.0, decay)


@st.composite
def adamws(draw: st.DrawFn) -> filters.AdamW:
    lr = 10.0 ** draw(st.floats(-1.5, 0.3))
    rest = draw(st.floats(0.0, 0.95)), draw(st.floats(0.0, 0.9)) / lr
    flt = filters.AdamW(lr, *rest, lr * draw(EXTRAPOLATIONS))
    assume(flt.composes)
    return flt


def hessian(seed: int, least: float) -> np.ndarray:
    """A random symmetric matrix with eigenvalues from `least`."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    return (q * (least + 4.0 * rng.random(N))) @ q.T


def assert_filter_agrees(block: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> None:
    """Fail unless "0 <= lower and upper <= 2" says whether the spectral radius is below 1."""
    radius = np.abs(np.linalg.eigvals(block)).max()
    inside = np.linalg.eigvalsh(lower)[0] >= 0.0 and np.linalg.eigvalsh(upper)[-1] <= 2.0
    if abs(radius - 1.0) > 1e-6:
        assert inside == (radius < 1.0)


CASES = (st.integers(0, 1000), st.sampled_from([-0.3, 0.1]))


@given(st.lists(momenta(), min_size=N, max_size=N), *CASES)
def test_heavy_ball_and_nesterov_compose(
    groups: list[filters.HeavyBall], seed: int, least: float
) -> None:
    """Each coordinate is a group of its own; the block on (x, m) follows torch's update.

    d is taken at y = x - e m.
    """
    d = hessian(seed, least) + np.diag([f.weight_decay for f in groups])
    e = np.diag([f.extrapolation for f in groups])
    tau = np.array([f.dampening if f.momentum else 0.0 for f in groups])
    beta, nesterov = np.diag([f.momentum for f in groups]), np.diag([f.nesterov for f in groups])
    zero, one = np.zeros((N, N)), np.eye(N)
    at_y = d @ np.hstack([one, -e])
    m = (1.0 - tau)[:, None] * at_y + np.hstack([zero, beta])
    update = nesterov @ (at_y + beta @ m) + (one - nesterov) @ m
    x = np.hstack([one, zero]) - np.diag([f.lr for f in groups]) @ update
    root = np.sqrt([f.rate for f in groups])
    matrix = root[:, None] * d * root
    assert_filter_agrees(np.vstack([x, m]), matrix, matrix)


@given(st.lists(adamws(), min_size=N, max_size=N), *CASES)
def test_adamw_composes(groups: list[filters.AdamW], seed: int, least: float) -> None:
    """Its decay is larger on the upper side, see docs/theory.md; it acts at y, as the gradient."""
    H, P = hessian(seed, least), 0.3 + np.random.default_rng(seed).random(N)
    names = ("lr", "beta1", "weight_decay", "extrapolation")
    lr, beta, decay, e = (np.array([getattr(f, name) for f in groups]) for name in names)
    y, zero = np.hstack([np.eye(N), -np.diag(e / P)]), np.zeros((N, N))
    m = (1.0 - beta)[:, None] * (H @ y) + np.hstack([zero, np.diag(beta)])
    x = np.hstack([np.eye(N), zero]) - (lr * decay)[:, None] * y - (lr / P)[:, None] * m
    root = np.sqrt([f.rate for f in groups] / P)
    lower = root[:, None] * (H + np.diag(P * decay)) * root
    upper = root[:, None] * (H + np.diag(P * [f.edge_decay for f in groups])) * root
    assert_filter_agrees(np.vstack([x, m]), upper, lower)


@pytest.mark.parametrize(
    "flt",
    [
        filters.HeavyBall(0.3, 0.6, 0.2),
        filters.Nesterov(0.3, 0.6),
        filters.AdamW(0.3, 0.6),
        filters.HeavyBall(0.3, 0.6, 0.2, extrapolation=0.4),
        filters.AdamW(0.3, 0.6, extrapolation=0.4),
        filters.AdamW(0.3, 0.6, extrapolation=-0.2),
        filters.HeavyBall(0.3),
    ],
    ids=repr,
)
def test_a_rate_is_that_of_gradient_descent(
    flt: filters.PolynomialFilter | filters.AdamW,
) -> None:
    plain = filters.HeavyBall(flt.rate)
    assert flt.max_eigenvalue() == pytest.approx(plain.max_eigenvalue())
