"""AdamW's edge against LAPACK, and against AdamW itself on a quadratic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eigenfilter as ef
from eigenfilter import filters


@given(
    st.floats(-6, 2).map(lambda e: 10.0**e),
    st.floats(0.0, 0.99),
    st.floats(0.0, 1.9),
    st.booleans(),
)
def test_edges_are_where_the_spectral_radius_crosses_one(
    lr: float, beta1: float, decay: float, maximize: bool
) -> None:
    flt = filters.AdamW(lr, beta1, decay / lr, maximize=maximize)
    [(low, high)] = flt.intervals()
    inside = np.array([0.999 * low + 0.001 * high, 0.001 * low + 0.999 * high])
    outside = np.array([low - 0.001 * (high - low), high + 0.001 * (high - low)])
    assert (flt.spectral_radius(inside) < 1 + 1e-12).all()
    assert (flt.spectral_radius(outside) > 1 - 1e-12).all()
    assert flt.admits([low, high]).all()


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
    with pytest.raises(TypeError, match="AMSGrad"):
        filters.of(torch.optim.AdamW([p], amsgrad=True))


def test_known_values() -> None:
    assert filters.AdamW(1e-3).intervals() == [(0.0, pytest.approx(38000))]
    assert filters.AdamW(0.0).intervals() == [(-math.inf, math.inf)]
    [(low, high)] = filters.AdamW(0.1, 0.0, 2.0, maximize=True).intervals()
    assert (low, high) == pytest.approx((-18, 2))


@pytest.mark.parametrize(
    "arguments", [(-1.0,), (0.1, 1.0), (0.1, -0.1), (0.1, 0.9, -1.0), (0.1, 0.9, 21.0)]
)
def test_bad_values(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="must"):
        filters.AdamW(*arguments)
