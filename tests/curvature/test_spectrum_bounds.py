"""Bounds of both ends of a spectrum: margins that hold as often as promised, and are small."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eigenfilter.curvature import SpectrumBounds, spectrum_bounds
from eigenfilter.curvature.solvers.spectrum_bounds import smallest_start, worst_share

RUNS = 300


class Diagonal:
    """diag(d), which counts its products."""

    def __init__(self, d: Tensor) -> None:
        self._d = d
        self.shape = (len(d), len(d))
        self.dtype, self.device = d.dtype, d.device
        self.products = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self._d * v

    def matmat(self, V: Tensor) -> Tensor:
        raise AssertionError("one vector at a time")


def spike(n: int) -> Tensor:
    """A single other eigenvalue: after one product the bound is attained."""
    d = torch.zeros(n, dtype=torch.float64)
    d[0] = 1
    return d


def chebyshev(n: int) -> Tensor:
    """Dense at both ends, with one value just beyond, which the Lanczos iteration sees late."""
    d = torch.cos(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    d[0] = 1.02
    return d


def uniform(n: int) -> Tensor:
    return torch.linspace(-1, 1, n, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spectrum", "n", "k", "least"),
    [(spike, 60, 1, 0.6), (chebyshev, 60, 6, 0.0), (chebyshev, 100, 8, 0.0), (uniform, 40, 4, 0)],
)
def test_error_bars_fail_as_rarely_as_they_say(
    spectrum: object, n: int, k: int, least: float
) -> None:
    """The upper end has half the probability, and its failures are counted."""
    d = spectrum(n)  # type: ignore[operator]
    allowed = 0.2
    failures = 0
    for seed in range(RUNS):
        top = spectrum_bounds(Diagonal(d), 2 * allowed, k, seed=seed).top
        failures += bool(top.value + top.margin < d.max())
    assert failures <= RUNS * allowed + 4 * math.sqrt(RUNS * allowed * (1 - allowed))
    assert failures >= least * RUNS * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_lie_within_their_margins(dtype: torch.dtype) -> None:
    d = torch.cat([torch.linspace(-1, 2, 3000), torch.tensor([5.0, -3.0])]).to(dtype)
    result = spectrum_bounds(Diagonal(d), 1e-3, 40, seed=3)
    for end, exact, sign in ((result.top, 5.0, 1), (result.bottom, -3.0, -1)):
        beyond = sign * (exact - end.value)
        assert -result.rounding <= beyond <= end.margin
        assert end.margin < 1e-5
        assert end.residual < 1e-5
    assert result.matvecs == 40
    assert result.scale == pytest.approx(5.0)


def test_a_dense_spectrum_has_small_error_bars_in_time() -> None:
    """Few products suffice for margins of one percent."""
    d = torch.linspace(0, 1, 20000, dtype=torch.float64)
    op = Diagonal(d)

    def enough(result: SpectrumBounds) -> bool:
        return max(result.top.margin, result.bottom.margin) < 0.01

    result = spectrum_bounds(op, 1e-3, 300, enough=enough, seed=0)
    assert result.top.value + result.top.margin >= 1
    assert op.products == result.matvecs < 100


def test_the_predicted_number_of_products_suffices() -> None:
    d = uniform(300)
    few = spectrum_bounds(Diagonal(d), 1e-3, 10, seed=1)
    more = few.products_for(0.05)
    assert more is not None
    assert few.top.margin > 0.05
    assert spectrum_bounds(Diagonal(d), 1e-3, more, seed=1).top.margin <= 0.05


@pytest.mark.parametrize("n", [10, 10**4, 10**7])
@pytest.mark.parametrize("k", [5, 40, 300])
def test_the_worst_case_is_kuczynski_and_wozniakowskis(n: int, k: int) -> None:
    """Their probability for this eps is at least ours, so our eps is at most theirs."""
    probability = 1e-3
    eps = worst_share(k, smallest_start(n, 2 * probability))
    theirs = 1.648 * math.sqrt(n) * math.exp(-math.sqrt(eps) * (2 * k - 1))
    assert theirs >= probability
    # And not by much where eps is small, as it is where it matters.
    if eps < 0.05:
        assert theirs < 2 * probability


def test_a_basis_of_the_whole_space_is_exact() -> None:
    d = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    result = spectrum_bounds(Diagonal(d), 1e-3, seed=0)
    assert result.exhausted
    assert result.matvecs == 4
    assert result.top.margin == result.rounding
    assert result.values.tolist() == pytest.approx([-1.0, 0.5, 2.0, 3.0])


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_multiple_of_the_identity(value: float) -> None:
    """The Krylov space is invariant after one product, up to rounding."""
    result = spectrum_bounds(Diagonal(torch.full((1000,), value, dtype=torch.float64)), seed=0)
    assert result.exhausted
    assert result.top.value == pytest.approx(value)
    assert result.top.margin <= 1e-8
    assert result.products_for(1e-12) is None


@pytest.mark.parametrize(
    ("arguments", "match"), [((0.0, 10), "failure"), ((1.0, 10), "failure"), ((0.5, 0), "matvecs")]
)
def test_bad_arguments(arguments: tuple[float, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        spectrum_bounds(Diagonal(torch.ones(3)), *arguments, seed=0)


def test_a_product_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError):
        spectrum_bounds(Diagonal(torch.tensor([1.0, torch.inf])), seed=0)
