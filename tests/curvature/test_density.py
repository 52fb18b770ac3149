"""Densities, traces, diagonals and determinants against dense spectra."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from curvature.dense import DenseOperator, operator
from eigenfilter import curvature
from eigenfilter.curvature.solvers.batched_lanczos import BatchedLanczos
from eigenfilter.curvature.solvers.estimates import _t_quantile
from eigenfilter.curvature.solvers.vector_ops import VectorOps


def hessian_like(n: int = 600) -> Tensor:
    """A bulk near 0, some of it negative, and ten outliers."""
    random = torch.Generator().manual_seed(1)
    bulk = 0.1 * torch.randn(n - 10, generator=random, dtype=torch.float64)
    return torch.cat([bulk, torch.linspace(2, 20, 10, dtype=torch.float64)])


def wasserstein(density: curvature.SpectralDensity, values: Tensor) -> float:
    """Return the Wasserstein distance of two spectra."""
    at, mass = density.measure()
    return stats.wasserstein_distance(
        at.numpy(), values.numpy(), u_weights=mass.clamp_min(0).numpy()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_density_of_a_hessian_like_spectrum(dtype: torch.dtype) -> None:
    values = hessian_like()
    op = operator(values, dtype, seed=600)
    density = curvature.spectral_density(op, probes=8, steps=40)
    assert density.matvecs == op.count == 320
    mass = density.measure()[1]
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    spread = values.std().item()
    assert wasserstein(density, values) < 0.02 * spread


def test_deflation_halves_the_distance_at_least() -> None:
    values = hessian_like()
    op = operator(values)
    top = curvature.eigsh(op, 10, tol=1e-8)
    plain, deflated = [], []
    for seed in range(5):
        plain.append(wasserstein(curvature.spectral_density(op, 4, 20, seed=seed), values))
        result = curvature.spectral_density(op, 4, 20, deflate=top, seed=seed)
        deflated.append(wasserstein(result, values))
    assert sum(deflated) < 0.5 * sum(plain)


def test_smoothed_and_histogram_forms() -> None:
    values = hessian_like()
    density = curvature.spectral_density(operator(values), 8, 40)
    grid = torch.linspace(-3, 23, 20001, dtype=torch.float64)
    smooth = density(grid, sigma=0.2)
    assert torch.trapezoid(smooth, grid).item() == pytest.approx(1, abs=1e-3)
    z = (grid[:, None] - values) / 0.2
    exact = torch.exp(-0.5 * z * z).mean(1) / (0.2 * math.sqrt(2 * math.pi))
    assert torch.trapezoid((smooth - exact).abs(), grid).item() < 0.02
    edges = [-1.0, 1.0, 21.0]
    shares = density.histogram(edges)
    assert shares.sum().item() == pytest.approx(1, abs=1e-9)
    assert shares[1].item() == pytest.approx(10 / 600, rel=0.3)
    assert density(grid).shape == grid.shape
    with pytest.raises(ValueError, match="sigma"):
        density(grid, sigma=0.0)


def test_moments_lie_in_their_confidence_intervals() -> None:
    """About 95 of 100 should; of 100 trials, 85 or fewer would be a 1 in 10,000 chance."""
    values = hessian_like(200)
    op = operator(values)
    inside = 0
    for seed in range(100):
        density = curvature.spectral_density(op, 6, 4, seed=seed)
        low, high = density.trace.interval(0.95)
        inside += bool(low <= values.sum() <= high)
        low, high = density.moment(2).interval(0.95)
        inside += bool(low <= values.square().mean() <= high)
    assert 170 < inside < 200


def test_all_of_a_small_space_is_exact() -> None:
    """Probes end after as many steps as there are distinct eigenvalues, three."""
    values = torch.tensor([1.0, 1.0, 2.0, 5.0, 5.0], dtype=torch.float64)
    density = curvature.spectral_density(operator(values), 2, 5)
    at, mass = density.measure()
    seen = at[mass > 1e-12]
    assert (seen[:, None] - values).abs().amin(1).max() < 1e-12
    full = curvature.eigsh(operator(values), 5, tol=1e-12)
    op = operator(values)
    exact = curvature.spectral_density(op, 2, 1, deflate=full)
    assert op.count == 0
    assert float(exact.trace) == pytest.approx(14)


def test_deflated_probes_are_right_on_average_in_a_small_space() -> None:
    """Vectors of signs would be biased after deflation."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 55.0], dtype=torch.float64)
    op = operator(values)
    top = curvature.eigsh(op, 1, tol=1e-12)
    result = curvature.spectral_density(op, 4000, 1, deflate=top).trace
    assert abs(float(result) - 86) < 4 * result.standard_error < 1.5


def test_the_recurrence_is_that_of_exact_arithmetic() -> None:
    """Compare coefficients in float32 and float64, from the same starts and products."""
    op = operator(hessian_like(), torch.float32, seed=600)
    matrix, starts = op.matrix.double(), torch.randn(3, 600, dtype=torch.float64)
    q = starts / starts.norm(dim=1, keepdim=True)
    run = BatchedLanczos(VectorOps(op), q.float(), torch.empty(0, 600))
    before, beta = torch.zeros_like(q), torch.zeros(3, 1, dtype=torch.float64)
    for _ in range(6):
        alpha, length = run.step(op.matmat(run.q.T).T.contiguous())
        w = q @ matrix - beta * before
        exact = (w * q).sum(1, keepdim=True)
        w -= exact * q
        before, beta = q, w.norm(dim=1, keepdim=True)
        q = w / beta
        torch.testing.assert_close(alpha, exact[:, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(length, beta[:, 0], rtol=0, atol=2e-5)
        lengths = run.q.double().norm(dim=1)
        assert (lengths - 1).abs().max() < 1e-3  # kept so without a pass of their own
        torch.testing.assert_close(run.q.double() / lengths[:, None], q, rtol=0, atol=2e-5)


def test_a_recurrence_that_ends_is_zero_from_then_on() -> None:
    """One start is an eigenvector; the other two continue."""
    values = torch.arange(1.0, 7.0, dtype=torch.float64)
    op, starts = DenseOperator(values.diag()), torch.ones(3, 6, dtype=torch.float64)
    starts[1] = torch.eye(6)[3]
    run = BatchedLanczos(
        VectorOps(op), starts / starts.norm(dim=1, keepdim=True), torch.empty(0, 6)
    )
    for j in range(3):
        alpha, beta = run.step(op.matmat(run.q.T).T.contiguous())
        assert alpha[1] == (4 if j == 0 else 0)
        assert beta[1] == 0
        assert (beta[[0, 2]] > 0.1).all()


def test_products_are_only_read() -> None:
    """An operator may return its argument, or memory of its own."""
    identity = DenseOperator(torch.eye(50))
    identity.matmat = lambda V: V  # type: ignore[method-assign]
    at, mass = curvature.spectral_density(identity, 2, 3).measure()
    assert ((at[mass > 0] - 1).abs() < 1e-6).all()


def test_probes_are_kept_apart_from_what_is_deflated() -> None:
    values = hessian_like(200)
    op = operator(values)
    top = curvature.eigsh(op, 5, tol=1e-10)
    deflated = top.vectors.T.contiguous()
    q = torch.randn(3, 200, dtype=torch.float64)
    ops = VectorOps(op)
    ops.orthogonalize(q, deflated)
    run = BatchedLanczos(ops, q / q.norm(dim=1, keepdim=True), deflated)
    for _ in range(30):
        run.step(op.matmat(run.q.T).T.contiguous())
        assert (run.q @ deflated.T).abs().max() < 1e-13


@pytest.mark.parametrize("rows", [3, 70])
def test_an_orthonormal_basis_of_rows_that_depend_on_each_other(rows: int) -> None:
    vectors = torch.randn(rows, 100, dtype=torch.float64)
    vectors[1] = 0
    vectors[rows - 1] = vectors[0]
    ops = VectorOps(DenseOperator(torch.eye(100, dtype=torch.float64)))
    basis = ops.orthonormal(vectors, torch.Generator().manual_seed(0))
    assert (basis @ basis.T - torch.eye(rows)).abs().max() < 1e-13
    assert (vectors - vectors @ basis.T @ basis).abs().max() < 1e-12


def test_a_zero_operator() -> None:
    density = curvature.spectral_density(DenseOperator(torch.zeros(20, 20)), 2, 4)
    at, _ = density.measure()
    assert (at == 0).all()
    assert float(density.trace) == 0


def test_the_trace() -> None:
    values = 0.8 ** torch.arange(100, dtype=torch.float64)
    op = operator(values)
    hutch = curvature.trace(op, 45)
    assert op.count == 45
    exact = values.sum()
    assert abs(float(hutch) - exact) < 4 * hutch.standard_error + 1e-9 * exact
    plain = curvature.spectral_density(op, 45, 1).trace
    assert hutch.standard_error < 0.5 * plain.standard_error


def test_the_trace_of_a_small_space_is_exact() -> None:
    values = torch.tensor([1.0, -3.0, 7.0], dtype=torch.float64)
    result = curvature.trace(operator(values), 12)
    assert float(result) == pytest.approx(5, abs=1e-12)
    assert result.standard_error == 0
    assert result.interval() == (result.value, result.value)


def test_the_diagonal() -> None:
    op = operator(hessian_like(100))
    result = curvature.diagonal(op, 400)
    z = (result.value - op.matrix.diagonal()) / result.standard_error
    assert z.abs().max() < 5
    assert 0.7 < z.std() < 1.3
    assert curvature.diagonal(op, 1).standard_error.isnan().all()


def test_the_diagonal_of_a_diagonal_is_exact() -> None:
    values = torch.linspace(-1, 3, 10, dtype=torch.float64)
    result = curvature.diagonal(DenseOperator(values.diag()), 2)
    torch.testing.assert_close(result.value, values)


def test_the_log_determinant() -> None:
    values = torch.linspace(0.1, 8, 300, dtype=torch.float64)
    op = operator(values)
    result = curvature.log_determinant(op, damping=0.5, probes=10, steps=40)
    exact = (values + 0.5).log().sum()
    assert abs(float(result) - exact) < 4 * result.standard_error
    assert result.standard_error < 0.02 * abs(exact)
    top = curvature.eigsh(op, 10, tol=1e-8)
    deflated = curvature.log_determinant(op, 0.5, 10, 40, deflate=top)
    assert abs(float(deflated) - exact) < 4 * deflated.standard_error


def test_the_log_of_a_negative_value_raises() -> None:
    op = operator(hessian_like(100))
    with pytest.raises(ValueError, match="raise damping above"):
        curvature.log_determinant(op, damping=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        lambda op: curvature.spectral_density(op, 0),
        lambda op: curvature.spectral_density(op, 2, 0),
        lambda op: curvature.trace(op, 5),
        lambda op: curvature.diagonal(op, 0),
        lambda op: curvature.spectral_density(op, 2, 4).trace.interval(1.0),
        lambda op: curvature.spectral_density(
            op, deflate=curvature.eigsh(operator(torch.arange(9.0).double()), 2)
        ),
    ],
)
def test_bad_arguments_raise(call: object) -> None:
    with pytest.raises(ValueError, match=r"must be|pass the result"):
        call(operator(hessian_like(50)))  # type: ignore[operator]


ESTIMATES = [
    lambda op: curvature.spectral_density(op, 2, 3),
    curvature.trace,
    lambda op: curvature.diagonal(op, 3),
]


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_products_that_are_not_finite_raise(estimate: object) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        estimate(DenseOperator(torch.full((40, 40), torch.nan)))  # type: ignore[operator]


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_operators_in_half_precision_raise(estimate: object) -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        estimate(DenseOperator(torch.ones(40, 40, dtype=torch.bfloat16)))  # type: ignore[operator]


def test_the_error_of_the_diagonal_is_right_beside_large_elements() -> None:
    """As the mean square minus the squared mean the error would be lost in rounding."""
    matrix = torch.full((3, 3), 1e-3, dtype=torch.float64)
    matrix += torch.diag(torch.full((3,), 1e6, dtype=torch.float64))
    result = curvature.diagonal(DenseOperator(matrix), 1000)
    expected = 1e-3 * (2 / 1000) ** 0.5
    assert (result.standard_error / expected - 1).abs().max() < 0.1


def test_the_global_generator_is_not_used() -> None:
    state = torch.get_rng_state()
    op = operator(hessian_like(50))
    first, again = (curvature.spectral_density(op, 3, 5, seed=4).nodes for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
def test_quantiles_of_students_t(freedom: int) -> None:
    for probability in (0.6, 0.9, 0.975, 0.9995):
        exact = stats.t.ppf(probability, freedom)
        assert _t_quantile(probability, freedom) == pytest.approx(exact, rel=1e-9)


def test_a_plot() -> None:
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib.figure import Figure

    density = curvature.spectral_density(operator(hessian_like(100)), 4, 20)
    ax = density.plot(Figure().subplots())
    assert len(ax.lines) == 1
    assert ax.get_yscale() == "log"
