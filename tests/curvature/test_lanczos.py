"""eigsh against dense eigendecompositions, with invariant subspaces and multiplicities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from curvature.dense import DTYPES, DenseOperator, assert_eigenpairs, decaying, operator, wanted
from eigenfilter.curvature import eigsh


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 5, 8])
@pytest.mark.parametrize("criterion", ["value", "vector"])
def test_agrees_with_the_spectrum_and_stops_by_itself(
    dtype: torch.dtype, which: str, k: int, criterion: str
) -> None:
    spectrum = decaying(300)
    op = operator(spectrum, dtype)
    result = eigsh(op, k, which, tol=1e-3, criterion=criterion, max_basis=160)
    assert_eigenpairs(op, result, wanted(spectrum, k, which), 1e-3)
    assert result.matvecs - result.multiplicity_matvecs < 150
    assert result.reason == f"{k} pairs converged"
    vectors = result.vectors.double()
    measured = (op.matrix.double() @ vectors - vectors * result.values).norm(dim=0)
    rounding = 31 * 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.residuals.double(), measured, rtol=0, atol=rounding)
    if criterion == "vector":
        eigenvectors = torch.linalg.eigh(op.matrix.double()).eigenvectors
        cosines = (eigenvectors.T @ result.vectors.double()).abs().amax(0)
        assert (1 - cosines.square()).clamp_min(0).sqrt().max() < 1e-3


@pytest.mark.parametrize("max_basis", [14, 18, None])
@pytest.mark.parametrize(("k", "which"), [(10, "LA"), (8, "LM"), (6, "BE")])
def test_restarts(max_basis: int | None, k: int, which: str) -> None:
    """More products than columns of the basis give the same result."""
    outside = 10 * 0.9 ** torch.arange(20.0, dtype=torch.float64)
    spectrum = torch.cat([outside, -0.8 * outside, torch.linspace(-1, 1, 400, dtype=torch.float64)])
    op = operator(spectrum)
    result = eigsh(op, k, which, max_basis=max_basis, max_matvecs=2000)
    assert_eigenpairs(op, result, wanted(spectrum, k, which), 1e-4)
    assert result.matvecs - result.multiplicity_matvecs > (max_basis or 20)


def test_agrees_with_lapack_on_a_random_matrix_at_a_tight_tolerance() -> None:
    normal = torch.randn(120, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    op = DenseOperator(normal + normal.T)
    expected = torch.linalg.eigvalsh(op.matrix)
    result = eigsh(op, 7, "BE", tol=1e-11, max_matvecs=1000)
    assert_eigenpairs(op, result, wanted(expected, 7, "BE"), 1e-11)


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
    assert_eigenpairs(op, eigsh(op, k, which), wanted(torch.tensor(spectrum), k, which), 1e-4)


@pytest.mark.parametrize("seed", [0, 5, 7, 9])
def test_a_basis_of_the_whole_space_has_converged_at_any_tolerance(seed: int) -> None:
    """It has converged, although rounding forbids the tolerance."""
    spectrum = 0.5 ** torch.arange(60)
    op = operator(spectrum, torch.float32, seed)
    assert_eigenpairs(op, eigsh(op, 60, tol=1e-12), wanted(spectrum, 60, "LA"), 1e-12)


def test_a_cluster_is_resolved() -> None:
    spectrum = torch.cat(
        [2.0 - 1e-5 * torch.arange(5, dtype=torch.float64), torch.linspace(0, 1, 145)]
    )
    op = operator(spectrum)
    assert_eigenpairs(op, eigsh(op, 6, tol=1e-9), wanted(spectrum, 6, "LA"), 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_repeated_eigenvalues_that_one_sequence_cannot_see(dtype: torch.dtype, seed: int) -> None:
    small = torch.linspace(-1e-3, 1e-3, 400)
    spectrum = torch.cat([torch.tensor([10.0, 10, 9, 8, 8, 7, 6]), small])
    op = operator(spectrum, dtype)
    result = eigsh(op, 7, seed=seed)
    assert_eigenpairs(op, result, wanted(spectrum, 7, "LA"), 1e-4)
    assert 0 < result.multiplicity_matvecs <= 20
    blind = eigsh(op, 4, seed=seed, check_multiplicity=False)
    assert blind.multiplicity_matvecs == 0
    torch.testing.assert_close(
        blind.values.double(), torch.tensor([10.0, 9, 8, 7]).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("which", ["SA", "LM", "BE"])
@pytest.mark.parametrize("distance", [0.0, 1e-9])
def test_repeated_eigenvalues_at_either_end(which: str, distance: float) -> None:
    ends = torch.tensor([7.0, 7 + distance, 5, -6, -6 - distance, -6, -4], dtype=torch.float64)
    spectrum = torch.cat([ends, torch.linspace(-1, 1, 200, dtype=torch.float64)])
    op = operator(spectrum)
    assert_eigenpairs(op, eigsh(op, 6, which), wanted(spectrum, 6, which), 1e-4)


def test_the_check_for_repeated_eigenvalues_does_not_change_the_pairs() -> None:
    op = operator(decaying(200))
    without = eigsh(op, 6, check_multiplicity=False)
    result = eigsh(op, 6)
    assert result.matvecs - result.multiplicity_matvecs == without.matvecs
    torch.testing.assert_close(result.values, without.values)
    torch.testing.assert_close(result.vectors, without.vectors)


def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest() -> None:
    spectrum = decaying(120)
    op = operator(spectrum)
    lowest = torch.linalg.eigh(op.matrix).eigenvectors[:, 0]
    assert_eigenpairs(op, eigsh(op, 1, v0=lowest), wanted(spectrum, 1, "LA"), 1e-4)
    op.count = 0
    assert_eigenpairs(op, eigsh(op, 6, v0=lowest), wanted(spectrum, 6, "LA"), 1e-4)


def test_a_warm_start_takes_fewer_products() -> None:
    spectrum = torch.cat([torch.tensor([31.0, 24.0, 19.5]), torch.linspace(-1, 16, 397)])
    before = eigsh(operator(spectrum), 3)
    op = operator(spectrum)
    shift = torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    op.matrix += 1e-4 * (shift + shift.T)
    expected = wanted(torch.linalg.eigvalsh(op.matrix), 3, "LA")
    for start, k in ((before, 3), (before.vectors, 3), (before.vectors[:, 0], 1)):
        cold = eigsh(op, k, check_multiplicity=False).matvecs
        op.count = 0
        warm = eigsh(op, k, v0=start, check_multiplicity=False)
        assert_eigenpairs(op, warm, expected[:k], 1e-4)
        assert warm.matvecs <= 0.8 * cold


def test_the_best_pairs_are_returned_when_products_run_out() -> None:
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
    good = result.errors <= 1e-4 * result.values.abs()
    assert torch.equal(result.converged, good)
    assert result.converged[0]
    assert not result.converged[-1]


def test_a_check_for_repeated_eigenvalues_that_is_cut_short_warns() -> None:
    op = operator(decaying(300))
    alone = eigsh(op, 6, check_multiplicity=False)
    with pytest.warns(RuntimeWarning, match=r"6 pairs converged; .* eigenvalues short: raise it"):
        result = eigsh(op, 6, max_matvecs=alone.matvecs + 2)
    assert result.converged.all()
    assert result.multiplicity_matvecs <= 2


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
    assert_eigenpairs(op, eigsh(op, 3), wanted(decaying(60), 3, "LA"), 1e-4)
    assert not op.held


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("after", [0, 4])
def test_a_product_that_is_not_finite_raises(bad: float, after: int) -> None:
    class Breaking(DenseOperator):
        def matvec(self, v: Tensor) -> Tensor:
            w = super().matvec(v)
            w[3] = bad if self.count > after else w[3]
            return w

    with pytest.raises(FloatingPointError, match=f"product {after + 1} of H .* not finite"):
        eigsh(Breaking(operator(decaying(60)).matrix), 3)


@pytest.mark.parametrize("wrong", [torch.float64, torch.float16, "shape"])
def test_a_product_of_another_kind_raises(wrong: torch.dtype | str) -> None:
    class Changing(DenseOperator):
        def matvec(self, v: Tensor) -> Tensor:
            w = super().matvec(v)
            if self.count < 4:
                return w
            return w[:, None] if isinstance(wrong, str) else w.to(wrong)

    op = Changing(operator(decaying(60), torch.float32).matrix)
    with pytest.raises(TypeError, match=r"product 4 is .* the operator takes \[60\]"):
        eigsh(op, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 21}, r"k must be in \[1, n\] = \[1, 20\]"),
        ({"k": 0}, "k must be in"),
        ({"which": "SM"}, "which must be one of .*'BE'"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"tol": float("nan")}, "tol must be positive"),
        ({"max_matvecs": 3}, "max_matvecs must be at least k = 4"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"criterion": "both"}, r"criterion must be one of \['value', 'vector'\]"),
        ({"max_basis": 7}, r"max_basis must be at least .* = 8"),
        ({"v0": torch.ones(19)}, r"v0 must have shape \[20\] or \[20, c\], not \[19\]"),
        ({"v0": torch.ones(20, 0)}, "v0 must have shape"),
        ({"v0": torch.ones(20, 1, 1)}, "v0 must have shape"),
        ({"v0": torch.zeros(20)}, "v0 must be finite and not zero"),
        ({"v0": torch.full((20,), torch.nan)}, "v0 must be finite and not zero"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    op = operator(decaying(20))
    with pytest.raises(ValueError, match=message):
        eigsh(op, **{"k": 4, **arguments})  # type: ignore[arg-type]
    assert op.count == 0


def test_half_precision_raises() -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        eigsh(operator(decaying(20), torch.bfloat16), 3)


def test_one_is_a_block_size() -> None:
    op = operator(decaying(40))
    assert_eigenpairs(op, eigsh(op, 2, block_size=1), wanted(decaying(40), 2, "LA"), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("block_size", [2, 4])
def test_blocks_agree_with_the_spectrum(dtype: torch.dtype, which: str, block_size: int) -> None:
    class OnlyBlocks(DenseOperator):
        def matvec(self, v: Tensor) -> Tensor:
            raise AssertionError("one vector at a time")

    spectrum = 10 / torch.arange(1.0, 301.0, dtype=torch.float64)
    spectrum[1::2] *= -0.9
    op = OnlyBlocks(operator(spectrum, dtype).matrix)
    result = eigsh(op, 6, which, block_size=block_size)
    assert_eigenpairs(op, result, wanted(spectrum, 6, which), 1e-4)
    assert result.matvecs % block_size == 0


def test_a_block_finds_multiplicities_up_to_its_size() -> None:
    spectrum = torch.cat([torch.tensor([5.0] * 4 + [4.0] * 3), torch.linspace(0, 1, 150)])
    op = operator(spectrum)
    for block_size, looks in ((4, False), (2, True), (1, True)):
        op.count = 0
        result = eigsh(op, 7, block_size=block_size, check_multiplicity=looks)
        assert_eigenpairs(op, result, wanted(spectrum, 7, "LA"), 1e-4)


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [([5.0] * 3 + [1.0] * 20, 4), ([0.0] * 30, 3), ([1.0] * 10, 10), ([3.0, -2.0, 1.0], 2)],
)
def test_blocks_exhaust_invariant_subspaces(spectrum: list[float], k: int) -> None:
    for block_size in (2, 4):
        op = operator(torch.tensor(spectrum))
        result = eigsh(op, k, block_size=block_size)
        assert_eigenpairs(op, result, wanted(torch.tensor(spectrum), k, "LA"), 1e-4)


def test_a_block_starts_from_a_block() -> None:
    spectrum = torch.cat([10 - torch.arange(4.0) / 10, torch.linspace(-1, 9, 300)]).double()
    op = operator(spectrum)
    before = eigsh(op, 4, block_size=4, check_multiplicity=False, max_matvecs=900)
    warm = eigsh(op, 4, block_size=4, check_multiplicity=False, v0=before)
    assert warm.matvecs <= 0.7 * before.matvecs
    torch.testing.assert_close(warm.values, before.values, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_the_basis_may_lie_on_the_host(device: str) -> None:
    op = operator(decaying(300), torch.float32)
    here = eigsh(op, 5, v0=torch.ones(300))
    there = DenseOperator(op.matrix.to(device))
    result = eigsh(there, 5, basis_device="cpu", v0=torch.ones(300))
    assert result.vectors.device.type == result.converged.device.type == device
    torch.testing.assert_close(result.values.cpu(), here.values, rtol=1e-5, atol=0)
    assert result.orthogonality < 1e-5


@pytest.mark.parametrize("spread", [0.01, 0.003, 1e-3])
def test_close_pairs_are_resolved_at_the_default_tolerance(spread: float) -> None:
    """One sequence takes two eigenvalues for one if they differ by tol to sqrt(tol)."""
    bulk = 0.03 * torch.rand(190, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    op = operator(torch.cat([torch.tensor([1.0, 1 - spread], dtype=torch.float64), bulk]))
    for seed in range(25):
        result = eigsh(op, 1, seed=seed)
        assert abs(float(result.values[0]) - 1) <= 2e-4
