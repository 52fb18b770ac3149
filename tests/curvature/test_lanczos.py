"""Lanczos against dense eigendecompositions, its own identity, and the traps of invariance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from eigenfilter.curvature import EigenResult, eigsh
from eigenfilter.curvature.lanczos import _Lanczos, _Projection

DTYPES = [torch.float64, torch.float32]


class DenseOperator:
    """A symmetric matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (len(matrix), len(matrix))
        self.dtype = matrix.dtype
        self.device = matrix.device
        self.count = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.matrix @ v


def operator(spectrum: Tensor, dtype: torch.dtype = torch.float64, seed: int = 5) -> DenseOperator:
    """Return an operator with this spectrum and random eigenvectors."""
    n = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, n, dtype=torch.float64, generator=generator)
    vectors = torch.linalg.qr(normal).Q
    matrix = (vectors * spectrum.double()) @ vectors.T
    return DenseOperator(((matrix + matrix.T) / 2).to(dtype))


def wanted(spectrum: Tensor, k: int, which: str) -> Tensor:
    """Return what eigsh should find, in its order, from the spectrum alone."""
    rising = spectrum.double().sort().values
    if which == "LA":
        return rising.flip(0)[:k]
    if which == "SA":
        return rising[:k]
    if which == "LM":
        return rising[rising.abs().argsort(descending=True)][:k]
    return torch.cat([rising[: k // 2], rising[len(rising) - (k - k // 2) :]])


def decaying(n: int) -> Tensor:
    """A spectrum like that of a network: some large eigenvalues, many small, some below zero."""
    large = torch.tensor([31.0, 24.0, 19.5, -17.0, 14.0, 11.0, -9.0, 8.0, 6.5, 5.0, 4.0, -3.0])
    return torch.cat([large, torch.linspace(-0.5, 1.5, n - len(large))])


def check(op: DenseOperator, result: EigenResult, expected: Tensor, tol: float) -> None:
    """Values, vectors and evidence of a result that claims to have converged."""
    rounding = 40 * torch.finfo(op.dtype).eps * float(torch.linalg.matrix_norm(op.matrix, 2))
    matrix, vectors = op.matrix.double(), result.vectors.double()
    values, residuals = result.values.double(), result.residuals.double()
    k = len(expected)
    measured = (matrix @ vectors - vectors * values).norm(dim=0)
    allowed = tol * expected.abs() + rounding
    assert result.converged.all()
    assert result.values.dtype == result.vectors.dtype == result.residuals.dtype == op.dtype
    assert result.vectors.shape == (op.shape[0], k)
    assert ((values - expected).abs() <= allowed).all()
    assert (measured <= allowed).all()
    assert ((measured - residuals).abs() <= rounding).all()
    assert (vectors.T @ vectors - torch.eye(k)).abs().max() < 100 * torch.finfo(op.dtype).eps
    assert result.matvecs == op.count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 5, 8])
def test_agrees_with_the_spectrum_and_stops_by_itself(
    dtype: torch.dtype, which: str, k: int
) -> None:
    spectrum = decaying(300)
    op = operator(spectrum, dtype)
    result = eigsh(op, k, which, tol=1e-3)
    check(op, result, wanted(spectrum, k, which), 1e-3)
    assert result.matvecs < 150
    assert result.reason == f"{k} pairs converged"


def test_agrees_with_lapack_on_a_random_matrix_at_a_tight_tolerance() -> None:
    normal = torch.randn(120, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    op = DenseOperator(normal + normal.T)
    expected = torch.linalg.eigvalsh(op.matrix)
    result = eigsh(op, 7, "BE", tol=1e-11)
    check(op, result, wanted(expected, 7, "BE"), 1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanczos_identity_and_orthogonality(dtype: torch.dtype) -> None:
    """H Q - Q T = beta_m q_{m+1} e_m^T, past the first growth of the basis."""
    op = operator(decaying(200), dtype)
    run = _Lanczos(op, 100, seed=3)
    run.begin()
    for _ in range(70):
        run.step()
    t = run.collect(1e-4)
    assert run.size == 70
    dense = t.ritz.vectors * t.ritz.values @ t.ritz.vectors.T
    dense_off = dense - dense.tril(1).triu(-1)
    assert dense_off.abs().max() < 1e-12
    q = run.basis[:71].double().T
    remainder = op.matrix.double() @ q[:, :70] - q[:, :70] @ dense
    last = torch.zeros(200, 70, dtype=torch.float64)
    beta = remainder[:, -1].norm()
    last[:, -1] = beta * q[:, 70]
    eps = torch.finfo(dtype).eps
    assert beta > 0.1
    torch.testing.assert_close(
        t.ritz.residuals, beta * t.ritz.vectors[-1].abs(), rtol=1e-5, atol=30 * eps
    )
    assert (remainder - last).norm(dim=0).max() < 31 * 20 * eps
    assert (q.T @ q - torch.eye(71)).abs().max() < 20 * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spectrum", "k", "which"),
    [
        ([5.0] * 3 + [1.0] * 20, 2, "LA"),
        ([5.0] * 3 + [1.0] * 20, 4, "LA"),
        ([5.0] * 3 + [1.0] * 20, 23, "SA"),
        ([5.0, 5.0, 4.0, 4.0] + [1.0] * 20, 2, "LA"),
        ([5.0, 5.0, 4.0, 4.0] + [1.0] * 20, 3, "LA"),
        ([4.0, 4.0, -3.5, -3.5] + [0.5] * 30, 6, "LM"),
        ([4.0, 4.0, -3.5, -3.5] + [0.5] * 30, 5, "BE"),
        ([3.0, 2.0, 1.0] + [0.0] * 97, 6, "LA"),
        ([3.0, 2.0, 1.0] + [0.0] * 97, 4, "SA"),
        ([3.0, 2.0, -1.0] + [0.0] * 97, 5, "BE"),
        ([1e4, 0.5, 0.5, 0.5] + [0.0] * 50, 6, "LA"),
        ([0.0] * 30, 3, "LM"),
        ([1.0] * 40, 40, "LA"),
        ([3.0, -2.0], 2, "BE"),
        ([3.0, -2.0, 1.0], 1, "SA"),
        ([-7.0], 1, "LA"),
        ([0.0], 1, "LA"),
    ],
)
def test_multiplicity_rank_deficiency_and_small_n(
    dtype: torch.dtype, spectrum: list[float], k: int, which: str
) -> None:
    op = operator(torch.tensor(spectrum), dtype)
    check(op, eigsh(op, k, which), wanted(torch.tensor(spectrum), k, which), 1e-4)


def test_what_follows_a_closed_block_is_cut_off() -> None:
    run = _Lanczos(operator(torch.tensor([5.0] * 3 + [1.0] * 20)), 30, seed=3)
    run.begin()
    for _ in range(6):
        run.step()
    t = run.collect(1e-4)
    assert t.closed
    assert (run.size, run.products) == (2, 6)
    torch.testing.assert_close(t.ritz.values, torch.tensor([1.0, 5.0], dtype=torch.float64))


def test_blocks_do_not_touch_and_what_they_left_over_counts() -> None:
    alpha = torch.tensor([1.0, 2.0, 2.0, 7.0], dtype=torch.float64)
    beta = torch.tensor([0.5, 0.3, 0.4, 0.1], dtype=torch.float64)
    t = _Projection(alpha, beta, [0, 2, 3], floor=1e-3, tol=1e-2)
    pair = torch.linalg.eigh(torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64))
    order = [0, 2, 1, 3]  # 2 lies below the larger of the pair
    values = torch.cat([pair.eigenvalues, alpha[2:]])[order]
    residuals = torch.cat([0.3 * pair.eigenvectors[1].abs(), beta[2:]])[order]
    torch.testing.assert_close(t.ritz.values, values)
    torch.testing.assert_close(t.ritz.residuals, residuals)
    assert t.block.values.tolist() == [7.0]
    assert not t.closed
    assert _Projection(alpha, beta, [0, 2, 3], floor=1e-3, tol=2e-2).closed


@pytest.mark.parametrize("seed", [0, 5, 7, 9])
def test_a_basis_of_the_whole_space_has_converged_at_any_tolerance(seed: int) -> None:
    """Where a tolerance is out of reach, there is still nothing more to do."""
    spectrum = 0.5 ** torch.arange(60)
    op = operator(spectrum, torch.float32, seed)
    check(op, eigsh(op, 60, tol=1e-12), wanted(spectrum, 60, "LA"), 1e-12)


def test_a_cluster_is_resolved() -> None:
    spectrum = torch.cat(
        [2.0 - 1e-5 * torch.arange(5, dtype=torch.float64), torch.linspace(0, 1, 145)]
    )
    op = operator(spectrum)
    check(op, eigsh(op, 6, tol=1e-9), wanted(spectrum, 6, "LA"), 1e-9)


def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest() -> None:
    spectrum = decaying(120)
    op = operator(spectrum)
    lowest = torch.linalg.eigh(op.matrix).eigenvectors[:, 0]
    check(op, eigsh(op, 1, v0=lowest), wanted(spectrum, 1, "LA"), 1e-4)
    op.count = 0
    check(op, eigsh(op, 6, v0=lowest), wanted(spectrum, 6, "LA"), 1e-4)


def test_a_warm_start_takes_fewer_products() -> None:
    spectrum = torch.cat([torch.tensor([31.0, 24.0, 19.5]), torch.linspace(-1, 16, 397)])
    before = eigsh(operator(spectrum), 3)
    op = operator(spectrum)
    shift = torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    op.matrix += 1e-4 * (shift + shift.T)
    expected = wanted(torch.linalg.eigvalsh(op.matrix), 3, "LA")
    for start, k in ((before, 3), (before.vectors[:, 0], 1)):
        cold = eigsh(op, k).matvecs
        op.count = 0
        warm = eigsh(op, k, v0=start)
        check(op, warm, expected[:k], 1e-4)
        assert warm.matvecs <= 0.8 * cold


def test_what_it_has_when_products_run_out() -> None:
    op = operator(torch.linspace(0, 1, 300))
    with pytest.warns(RuntimeWarning, match="after 25 products with 0 of 10 .* max_matvecs"):
        result = eigsh(op, 10, max_matvecs=25)
    measured = (op.matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
    assert result.matvecs == op.count == 25
    assert not result.converged.any()
    assert measured.min() > 1e-3
    torch.testing.assert_close(result.residuals, measured, rtol=1e-9, atol=1e-12)
    assert result.reason.startswith("stopped after 25")


def test_some_pairs_converge_before_products_run_out() -> None:
    op = operator(decaying(300))
    with pytest.warns(RuntimeWarning, match="of 10 pairs"):
        result = eigsh(op, 10, max_matvecs=30)
    good = result.residuals <= 1e-4 * result.values.abs()
    assert torch.equal(result.converged, good)
    assert result.converged[0]
    assert not result.converged[-1]


def test_agrees_with_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse.linalg")
    op = operator(decaying(250))
    values, _ = sparse.eigsh(op.matrix.numpy(), k=9, which="LM")
    result = eigsh(op, 9, "LM", tol=1e-10)
    found = result.values.sort().values
    torch.testing.assert_close(found, torch.from_numpy(values).sort().values, rtol=1e-9, atol=0)


def test_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    results = [eigsh(operator(decaying(80)), 4, seed=seed).vectors for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_an_operator_may_return_its_argument() -> None:
    op = operator(torch.ones(12))
    op.matvec = lambda v: v  # type: ignore[method-assign]
    result = eigsh(op, 5)
    torch.testing.assert_close(result.values, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(result.vectors.T @ result.vectors, torch.eye(5, dtype=torch.float64))


def test_results_carry_no_graph() -> None:
    op = operator(decaying(50))
    op.matrix.requires_grad_()
    result = eigsh(op, 3, v0=torch.ones(50, dtype=torch.float64, requires_grad=True))
    assert not any(t.requires_grad for t in (result.values, result.vectors, result.residuals))


def test_holds_the_operator_fixed_while_it_works() -> None:
    class Watched(DenseOperator):
        held = False

        @contextmanager
        def fixed(self) -> Iterator[None]:
            self.held = True
            yield
            self.held = False

        def matvec(self, v: Tensor) -> Tensor:
            assert self.held
            return super().matvec(v)

    op = Watched(operator(decaying(60)).matrix)
    check(op, eigsh(op, 3), wanted(decaying(60), 3, "LA"), 1e-4)
    assert not op.held


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("after", [0, 4])
def test_a_product_that_is_not_finite_raises(bad: float, after: int) -> None:
    class Breaking(DenseOperator):
        def matvec(self, v: Tensor) -> Tensor:
            w = super().matvec(v)
            w[3] = bad if self.count > after else w[3]
            return w

    with pytest.raises(FloatingPointError, match="not finite"):
        eigsh(Breaking(operator(decaying(60)).matrix), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 21}, r"k must be in \[1, n\] = \[1, 20\]"),
        ({"k": 0}, "k must be in"),
        ({"which": "SM"}, "which must be one of .*'BE'"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"tol": float("nan")}, "tol must be positive"),
        ({"max_matvecs": 3}, "max_matvecs must be at least k = 4"),
        ({"block_size": 2}, "block_size"),
        ({"v0": torch.ones(19)}, r"v0 must have shape \[20\]"),
        ({"v0": torch.ones(20, 1)}, r"v0 must have shape \[20\]"),
        ({"v0": torch.zeros(20)}, "v0 must be finite and not zero"),
        ({"v0": torch.full((20,), torch.nan)}, "v0 must be finite and not zero"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    op = operator(decaying(20))
    with pytest.raises(ValueError, match=message):
        eigsh(op, **{"k": 4, **arguments})  # type: ignore[arg-type]
    assert op.count == 0


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        eigsh(operator(decaying(20), torch.bfloat16), 3)


def test_one_is_a_block_size() -> None:
    op = operator(decaying(40))
    check(op, eigsh(op, 2, block_size=1), wanted(decaying(40), 2, "LA"), 1e-4)
