"""Multiplying an operator by a power of two multiplies results, and changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.dense import DenseOperator, Diagonal, OneSlice, decaying, operator
from eigenfilter.certificate import certify
from eigenfilter.curvature import (
    HessianOperator,
    diagonal,
    eigsh,
    log_determinant,
    spectral_density,
    spectrum_bounds,
    trace,
)
from eigenfilter.curvature.norms import norms

# What an operator of norm 31 may be multiplied with, for its products to be normal numbers.
EXPONENTS = {
    torch.float64: [-1000, -900, -600, -300, -130, -20, 1, 90, 135, 500, 900, 1012],
    torch.float32: [-105, -84, -60, -30, -3, 1, 10, 29, 60, 100, 118],
}
EVERY = [(dtype, e) for dtype, found in EXPONENTS.items() for e in found]


class Counting(Diagonal):
    """A diagonal operator that counts its products."""

    def __init__(self, d: Tensor, slices: OneSlice | None = None) -> None:
        super().__init__(d, slices)
        self.count = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.count += 1
        return super().matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        return super().matmat(V)


def times(t: Tensor, exponent: int) -> Tensor:
    """2^exponent t, exactly."""
    half = exponent // 2
    return t * 2.0**half * 2.0 ** (exponent - half)


def pair(dtype: torch.dtype, exponent: int, d: Tensor | None = None) -> tuple[Counting, Counting]:
    d = (decaying(150) if d is None else d).to(dtype)
    return Counting(d), Counting(times(d, exponent))


def deep(dtype: torch.dtype, exponent: int) -> bool:
    """Return whether small elements of products are subnormal, and so rounded differently."""
    return exponent < (-800 if dtype == torch.float64 else -50)


def assert_scaled(
    result: Tensor, reference: Tensor, exponent: int, dtype: torch.dtype | None = None
) -> None:
    """Fail unless `result` is 2^exponent `reference`, up to the rounding of subnormal numbers."""
    expected = times(reference, exponent)
    info = torch.finfo(dtype or result.dtype)
    off = (result - expected).abs()
    if deep(dtype or result.dtype, exponent):
        assert (times(off, -exponent) <= 1e4 * info.eps * reference.abs().max()).all()
    else:
        assert ((off == 0) | (result.abs() <= info.tiny) & (expected.abs() <= info.tiny)).all()


@pytest.mark.parametrize(("dtype", "exponent"), EVERY)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"which": "SA", "k": 4},
        {"which": "LM", "max_basis": 16},
        {"which": "BE", "block_size": 3, "k": 5},
        {"criterion": "vector"},
    ],
    ids=str,
)
def test_eigsh(dtype: torch.dtype, exponent: int, options: dict[str, Any]) -> None:
    plain, scaled = pair(dtype, exponent)
    reference, result = (eigsh(op, **({"k": 6} | options)) for op in (plain, scaled))
    assert reference.converged.all()
    assert result.matvecs == scaled.count == plain.count
    assert (result.multiplicity_matvecs, result.reason) == (
        reference.multiplicity_matvecs,
        reference.reason,
    )
    if not deep(dtype, exponent):
        assert torch.equal(result.vectors, reference.vectors)
    assert torch.equal(result.converged, reference.converged)
    for name in ("values", "residuals", "errors"):
        assert_scaled(getattr(result, name), getattr(reference, name), exponent)


@pytest.mark.parametrize("exponent", EXPONENTS[torch.float32])
def test_a_basis_in_half_precision(exponent: int) -> None:
    plain, scaled = pair(torch.float32, exponent)
    reference, result = (eigsh(op, 5, basis_dtype=torch.float16) for op in (plain, scaled))
    assert result.matvecs == reference.matvecs
    assert_scaled(result.values, reference.values, exponent)
    assert_scaled(result.residuals, reference.residuals, exponent)


@pytest.mark.parametrize(("dtype", "exponent"), EVERY)
def test_slices(dtype: torch.dtype, exponent: int) -> None:
    d = decaying(150).to(dtype)
    reference, result = (
        eigsh(Counting(times(d, e), OneSlice(150)), 4, which="BE") for e in (0, exponent)
    )
    assert result.matvecs == reference.matvecs
    assert_scaled(result.values, reference.values, exponent)


@pytest.mark.parametrize("largest", [1e-170, 1e-300, 1e155, 1e300])
def test_forty_eigenvalues(largest: float) -> None:
    """`numpy.linalg.eigvalsh` gives the same three values, at any scale."""
    d = torch.arange(1, 41, dtype=torch.float64) * largest
    for which, expected in (("LA", d[-3:].flip(0)), ("SA", d[:3]), ("LM", d[-3:].flip(0))):
        torch.testing.assert_close(eigsh(Counting(d), 3, which).values, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("exponent", [-1040, -1060, -1074])
def test_subnormal_products_are_known_to_their_rounding(exponent: int) -> None:
    d = torch.tensor([40.0, 31, 20, *[1.0] * 47], dtype=torch.float64)
    result = eigsh(Counting(times(d, exponent)), 3)
    unit = 2.0**-1074
    expected = times(d[:3], exponent)
    assert ((result.values - expected).abs() <= 1e-4 * expected + 10 * unit * 50**0.5).all()


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-40, 1e40, 1e200, 1e307])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_a_start_does_not_matter(size: float, dtype: torch.dtype) -> None:
    """Its dtype does not matter either: the start is float64 and the operator float32."""
    d = decaying(120).to(dtype)
    start = torch.rand(120, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = (start * 2**20).round() / 2**20
    power = 2.0 ** round(float(torch.tensor(size, dtype=torch.float64).log2()))
    starts = {"one": start[:, 0], "several": start}
    for chosen in starts.values():
        reference, result = (eigsh(Counting(d), 2, v0=chosen * s) for s in (1.0, power))
        assert result.matvecs == reference.matvecs
        torch.testing.assert_close(result.values, reference.values)
    assert eigsh(Counting(d), 1, v0=torch.stack([start[:, 0], -start[:, 0]], 1)).converged.all()


@pytest.mark.parametrize(("dtype", "exponent"), EVERY)
def test_spectrum_bounds(dtype: torch.dtype, exponent: int) -> None:
    plain, scaled = pair(dtype, exponent)
    reference, result = (spectrum_bounds(op, max_matvecs=30, seed=1) for op in (plain, scaled))
    if not deep(dtype, exponent):
        assert_scaled(result.values, reference.values, exponent)
        assert_scaled(result.residuals, reference.residuals, exponent)
    for a, b in ((result.top, reference.top), (result.bottom, reference.bottom)):
        for name in ("value", "residual", "margin"):
            one, other = (torch.tensor(getattr(x, name), dtype=torch.float64) for x in (a, b))
            assert abs(times(one, -exponent) - other) <= 1e-5 * 31
            if not deep(dtype, exponent):
                assert_scaled(one, other, exponent)
    assert result.exhausted == reference.exhausted


@pytest.mark.parametrize(("dtype", "exponent"), EVERY)
def test_spectral_density(dtype: torch.dtype, exponent: int) -> None:
    plain, scaled = pair(dtype, exponent)
    reference, result = (spectral_density(op, 3, 20, seed=2) for op in (plain, scaled))
    assert torch.equal(result.weights, reference.weights)
    assert_scaled(result.nodes, reference.nodes, exponent)
    assert_scaled(result.trace.value, reference.trace.value, exponent)
    assert_scaled(result.trace.standard_error, reference.trace.standard_error, exponent)
    grid = torch.linspace(-20, 35, 30, dtype=torch.float64)
    density = result(times(grid, exponent))
    torch.testing.assert_close(times(density, exponent), reference(grid))


@pytest.mark.parametrize(("dtype", "exponent"), EVERY)
@pytest.mark.parametrize("matvecs", [30, 900])
def test_trace(dtype: torch.dtype, exponent: int, matvecs: int) -> None:
    d = operator(decaying(150), dtype).matrix
    reference, result = (trace(DenseOperator(times(d, e)), matvecs, seed=3) for e in (0, exponent))
    assert_scaled(result.value, reference.value, exponent)
    assert_scaled(result.standard_error, reference.standard_error, exponent)
    assert (reference.standard_error > 0) == (matvecs == 30)


@pytest.mark.parametrize(("dtype", "exponent"), EVERY)
def test_diagonal(dtype: torch.dtype, exponent: int) -> None:
    d = operator(decaying(150), dtype).matrix
    reference, result = (diagonal(DenseOperator(times(d, e)), 9, seed=3) for e in (0, exponent))
    assert_scaled(result.value, reference.value, exponent)
    torch.testing.assert_close(
        times(result.standard_error, -exponent), reference.standard_error, rtol=1e-12, atol=0
    )


def test_each_element_of_a_diagonal_has_its_own_size() -> None:
    small = torch.rand(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    matrix = torch.block_diag(small + small.T, 1e-200 * (small + small.T))
    result = diagonal(DenseOperator(matrix), 50)
    torch.testing.assert_close(
        result.standard_error[20:] * 1e200, result.standard_error[:20], rtol=0.5, atol=0
    )


@pytest.mark.parametrize("exponent", [-1000, -700, -200, 300, 900])
def test_log_determinant(exponent: int) -> None:
    d = torch.linspace(1, 5, 60, dtype=torch.float64)
    reference, result = (
        log_determinant(Counting(times(d, e)), probes=3, steps=60) for e in (0, exponent)
    )
    shift = 60 * exponent * torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(result.value, reference.value + shift)


class Quadratic(nn.Module):
    def __init__(self, d: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones_like(d))
        self.register_buffer("d", d)

    def forward(self, _: Tensor) -> Tensor:
        return 0.5 * (self.x * self.d * self.x).sum()


@pytest.mark.parametrize("exponent", [-800, -580, 480])
def test_a_point_that_is_no_equilibrium_is_none_at_any_scale(exponent: int) -> None:
    model = Quadratic(times(torch.linspace(1, 5, 30, dtype=torch.float64), exponent))
    opt = torch.optim.SGD(model.parameters(), lr=2.0**-exponent)
    data = (torch.ones(1), torch.ones(1))
    result = certify(model, lambda value, _: value, data, opt, seed=1)
    assert result.verdict == "not an equilibrium"
    assert result.gradient_norm > 0
    assert result.sharpness == pytest.approx(5 * 2.0**exponent)


@pytest.mark.parametrize("exponent", [-900, -600, 400])
def test_finite_differences_tell_their_error_at_any_scale(exponent: int) -> None:
    """The loss or the vector is scaled; the error of the product is the same."""

    def of(e: int) -> HessianOperator:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        factor = torch.tensor(2.0, dtype=torch.float64) ** e
        data = (torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64))

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return (z - y).square().mean() * factor

        return HessianOperator(model, loss, data, engine="finite_difference")

    v = torch.ones(of(0).shape[0], dtype=torch.float64)
    reference, scaled, unscaled = of(0), of(exponent), of(0)
    expected = reference.matvec(v)
    assert reference.error is not None
    torch.testing.assert_close(times(scaled.matvec(v), -exponent), expected, rtol=1e-9, atol=1e-9)
    assert scaled.error == pytest.approx(reference.error, rel=0.5)
    result = unscaled.matvec(times(v, exponent))
    torch.testing.assert_close(times(result, -exponent), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms(dtype: torch.dtype) -> None:
    v = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=dtype)
    for exponent in EXPONENTS[dtype]:
        assert_scaled(norms(times(v, exponent)), torch.tensor([5.0, 0.0], dtype=dtype), exponent)
        assert_scaled(norms(times(v[:, 0], exponent)), torch.tensor(5.0, dtype=dtype), exponent)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e20), (torch.float64, 1e155)])
def test_finite_differences_where_squares_of_parameters_overflow(
    dtype: torch.dtype, size: float
) -> None:
    """The step depends on the norm of the parameters; the loss is (w_1 - 1)^2."""
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[size, 1.0]], dtype=dtype))
    data = torch.tensor([[0.0, 1.0]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
    op = HessianOperator(model, nn.MSELoss(), data, engine="finite_difference")
    product = op @ torch.tensor([0.0, 1.0], dtype=dtype)
    torch.testing.assert_close(product, torch.tensor([0.0, 2.0], dtype=dtype))
