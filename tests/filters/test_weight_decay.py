"""What weight decay does to the filter of an ascent: exact on quadratics, else off by order wd."""

from __future__ import annotations

import pytest
from scipy.optimize import brentq

from eigenfilter.filters import USAM

RHO = 0.1


def gradient(x: float, cubic: float) -> float:
    """Of a function with minimum at 1, Hessian 2 there and third derivative `cubic`."""
    return 2.0 * (x - 1.0) + 0.5 * cubic * (x - 1.0) ** 2


def hessian(x: float, cubic: float) -> float:
    return 2.0 + cubic * (x - 1.0)


def gap(wd: float, cubic: float) -> tuple[float, float]:
    """At USAM's equilibrium: the Jacobian of d less p(H), and rho f''' g (1 + rho H)."""

    def direction(x: float) -> float:
        return gradient(x + RHO * gradient(x, cubic), cubic) + wd * x

    x = brentq(direction, 0.5, 1.2, xtol=1e-15)
    g, h = gradient(x, cubic), hessian(x, cubic)
    jacobian = hessian(x + RHO * g, cubic) * (1.0 + RHO * h)
    return jacobian - float(USAM(0.1, rho=RHO).p(h)), RHO * cubic * g * (1.0 + RHO * h)


@pytest.mark.parametrize("wd", [0.02, 0.2])
def test_usams_filter_is_exact_on_a_quadratic(wd: float) -> None:
    assert gap(wd, 0.0)[0] == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("wd", [1e-3, 1e-2])
def test_usams_filter_is_off_by_the_third_derivative(wd: float) -> None:
    result, predicted = gap(wd, 3.0)
    assert abs(result) > 0.1 * wd
    assert result == pytest.approx(predicted, rel=1e-9)
