"""eigsh with a float16 basis, against a float32 basis and exact arithmetic."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.dense import DenseOperator, Diagonal, OneSlice, decaying, operator, wanted
from eigenfilter.curvature import EigenResult, eigsh, eigsh_cost
from eigenfilter.curvature.solvers.krylov_schur import KrylovSchur, Ritz

ROUNDING = 2.0**-11  # of a number in float16, relative, at most
VALUES = 1e-6  # what rounding may change of a value, relative to ||H||


def assert_eigenpairs(
    op: DenseOperator, result: EigenResult, expected: Tensor, tol: float = 1e-4
) -> None:
    """Fail unless the pairs are those of the matrix in float64, within their error bounds."""
    matrix, vectors = op.matrix.double(), result.vectors.double()
    values, residuals = result.values.double(), result.residuals.double()
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    measured = (matrix @ vectors - vectors * values).norm(dim=0)
    assert result.converged.all()
    assert result.vectors.dtype == op.dtype
    assert ((values - expected).abs() <= tol * expected.abs() + VALUES * norm).all()
    assert ((values - expected).abs() <= result.errors + VALUES * norm).all()
    assert (result.errors <= result.residuals).all()
    assert (measured <= residuals + 1e-6 * norm).all()
    assert (vectors.T @ vectors - torch.eye(len(expected))).abs().max() < 1e-6
    assert 0 < result.orthogonality < 5e-4
    assert result.matvecs == op.count


def both(op: DenseOperator, **arguments: Any) -> tuple[EigenResult, EigenResult]:
    plain = eigsh(op, **arguments)
    op.count = 0
    return plain, eigsh(op, basis_dtype=torch.float16, **arguments)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("block_size", [1, 3])
def test_values_agree_with_a_float32_basis(which: str, block_size: int) -> None:
    spectrum = 10 / torch.arange(1.0, 401.0, dtype=torch.float64)
    spectrum[1::2] *= -0.9
    op = operator(spectrum, torch.float32)
    plain, rounded = both(op, k=6, which=which, block_size=block_size)
    assert_eigenpairs(op, rounded, wanted(spectrum, 6, which))
    torch.testing.assert_close(rounded.values, plain.values, rtol=VALUES, atol=0)
    assert abs(rounded.matvecs - plain.matvecs) <= 0.05 * plain.matvecs
    apart = rounded.vectors - plain.vectors @ (plain.vectors.T @ rounded.vectors)
    assert torch.linalg.matrix_norm(apart, 2) < 4 * ROUNDING
    assert (rounded.residuals < plain.residuals + 4 * ROUNDING * 10).all()


@pytest.mark.parametrize(
    ("k", "which", "max_basis"), [(10, "LA", 14), (8, "LM", 13), (6, "BE", 10)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_restarts_lose_no_accuracy(k: int, which: str, max_basis: int, seed: int) -> None:
    outside = 10 * 0.9 ** torch.arange(20.0, dtype=torch.float64)
    spectrum = torch.cat([outside, -0.8 * outside, torch.linspace(-1, 1, 400, dtype=torch.float64)])
    op = operator(spectrum, torch.float32)
    plain, rounded = both(op, k=k, which=which, max_basis=max_basis, max_matvecs=900, seed=seed)
    assert_eigenpairs(op, rounded, wanted(spectrum, k, which))
    assert rounded.matvecs > 2 * max_basis
    torch.testing.assert_close(rounded.values, plain.values, rtol=2 * VALUES, atol=0)
    assert abs(rounded.matvecs - plain.matvecs) <= 0.05 * plain.matvecs


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [
        ([10.0, 10, 9, 8, 8, 7, 6] + [1e-3 * (i % 7) for i in range(200)], 7),
        ([5.0] * 3 + [1.0] * 20, 4),
        ([2 - 1e-4 * i for i in range(5)] + [i / 145 for i in range(145)], 6),
        ([2 - 1e-6 * i for i in range(5)] + [i / 145 for i in range(145)], 6),
        ([3.0, 2.0, 1.0] + [0.0] * 97, 6),
        ([1.0] * 30, 4),
        ([0.0] * 30, 3),
        ([3.0, -2.0], 2),
    ],
    ids=["copies", "few values", "cluster", "close cluster", "rank", "identity", "zero", "small"],
)
@pytest.mark.parametrize("block_size", [1, 2])
def test_repeated_eigenvalues_and_clusters(spectrum: list[float], k: int, block_size: int) -> None:
    op = operator(torch.tensor(spectrum), torch.float32)
    result = eigsh(op, k, block_size=block_size, basis_dtype=torch.float16)
    assert_eigenpairs(op, result, wanted(torch.tensor(spectrum), k, "LA"))


@pytest.mark.parametrize(
    ("n", "k", "which", "block_size", "seed"),
    [(34, 19, "LA", 4, 4), (45, 26, "LA", 2, 132), (48, 5, "LA", 1, 184)],
)
def test_restarts_beside_locked_pairs(
    n: int, k: int, which: str, block_size: int, seed: int
) -> None:
    """Rounding of kept vectors along locked ones counts too: a short basis, and multiplicities.

    After hundreds of restarts the bound of what rounding does to small values may exceed what is
    allowed, on some processors, and a warning says so; the values are right all the same.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.randn(n, generator=generator, dtype=torch.float64).round()
    op = operator(spectrum, torch.float32)
    max_basis = min(n, k + 2 * block_size + 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* the rounding of the basis keeps", RuntimeWarning)
        result = eigsh(
            op,
            k,
            which,
            block_size=block_size,
            basis_dtype=torch.float16,
            max_basis=max_basis,
            max_matvecs=2000,
            seed=seed,
        )
    expected = wanted(spectrum, k, which)
    error = (result.values.double() - expected).abs()
    norm = float(spectrum.abs().max())
    assert (error <= 20 * VALUES * norm).all()


def test_vectors_of_a_few_large_elements() -> None:
    """Their rounding is not random, and may lie along the vectors themselves."""
    spectrum = 10 / torch.arange(1.0, 501.0, dtype=torch.float64)
    noise = 1e-3 * torch.randn(500, 500, generator=torch.Generator().manual_seed(4)).double()
    matrix = torch.diag(spectrum) + (noise + noise.T) / 2
    op = DenseOperator(matrix.float())
    expected = torch.linalg.eigvalsh(op.matrix.double()).flip(0)[:8]
    plain, rounded = both(op, k=8, max_basis=14)
    assert_eigenpairs(op, rounded, expected)
    torch.testing.assert_close(rounded.values, plain.values, rtol=VALUES, atol=0)


def test_a_warm_start_takes_fewer_products() -> None:
    op = operator(decaying(300), torch.float32)
    before = eigsh(op, 3, check_multiplicity=False)
    again = eigsh(op, 3, v0=before, basis_dtype=torch.float16, check_multiplicity=False)
    assert again.matvecs <= 0.8 * before.matvecs
    torch.testing.assert_close(again.values, before.values, rtol=1e-4, atol=0)


def assert_rayleigh_ritz(run: KrylovSchur, op: DenseOperator, ritz: Ritz) -> None:
    """Fail unless the Ritz values are those of H on the span of the stored vectors."""
    rows = run.basis.rows[run.num_locked : run.size].double()
    gram, among = rows @ rows.T, rows @ op.matrix.double() @ rows.T
    values = torch.linalg.eigvals(torch.linalg.solve(gram, among)).real.sort().values
    assert (gram - torch.eye(len(rows))).abs().max() > 1e-5
    np.testing.assert_allclose(ritz.values, values, rtol=0, atol=31 * VALUES)
    vectors = run.vectors(ritz, np.arange(run.num_locked, run.size)).double()
    theta = torch.from_numpy(ritz.values)
    locked = run.basis.rows[: run.num_locked].double().T
    residual = op.matrix.double() @ vectors - vectors * theta
    residual -= locked @ torch.linalg.lstsq(locked, residual).solution if run.num_locked else 0
    bound = ritz.residuals + run.rounding_residuals(ritz, np.arange(run.num_locked, run.size))
    assert (residual.norm(dim=0).numpy() <= bound + 1e-4).all()
    assert (
        residual.norm(dim=0).numpy() >= ritz.residuals - ritz.residual_slack - 4 * ROUNDING * 31
    ).all()


@pytest.mark.parametrize("width", [1, 2])
def test_t_is_the_projection_onto_the_stored_vectors(width: int) -> None:
    op = operator(decaying(250), torch.float32)
    run = KrylovSchur(op, 16, width, seed=3, dtype=torch.float16)
    run.start()
    for _ in range(6):
        while not run.full:
            run.step(width)
        ritz = run.solve()
        assert_rayleigh_ritz(run, op, ritz)
        run.restart(ritz, np.array([0, 2, len(ritz.values) - 2, len(ritz.values) - 1]))
        assert_rayleigh_ritz(run, op, run.solve())
    ritz = run.solve()
    residuals = ritz.residuals[:3]
    run.lock(ritz, np.array([3, 0, 2]))
    run.start()
    while not run.full:
        run.step(width)
    ritz = run.solve()
    assert_rayleigh_ritz(run, op, ritz)
    run.restart(ritz, np.array([0, 3, 4]))
    run.step(width)
    assert_rayleigh_ritz(run, op, run.solve())
    run.unlock(residuals)
    assert_rayleigh_ritz(run, op, run.solve())


class Largest(TorchDispatchMode):
    """Records the largest allocation in bytes, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, Tensor):
                size = t.untyped_storage().nbytes()
                self.largest[t.dtype] = max(self.largest.get(t.dtype, 0), size)
        return out


def test_the_basis_takes_half_the_memory_and_no_copy_of_it_is_made() -> None:
    n, k, rows = 2**17, 3, 12
    d = torch.linspace(0, 1, n)
    d[:4] = torch.tensor([8.0, 6.0, 4.0, 3.0])
    with Largest() as plain:
        expected = eigsh(Diagonal(d), k, max_basis=rows)
    with Largest() as rounded:
        result = eigsh(Diagonal(d), k, max_basis=rows, basis_dtype=torch.float16)
    torch.testing.assert_close(result.values, expected.values, rtol=VALUES, atol=0)
    assert plain.largest[torch.float32] == 4 * n * (rows + 1)
    assert rounded.largest.pop(torch.float16) == 2 * n * (rows + 1)
    assert max(rounded.largest.values()) == 4 * n * k  # the result
    whole = eigsh_cost(n, k, max_basis=rows)
    half = eigsh_cost(n, k, max_basis=rows, basis_itemsize=2)
    assert whole.memory - half.memory == 2 * n * (rows + 1)
    assert half.traffic < whole.traffic


def test_slices() -> None:
    n = 2**16 + 3
    d = torch.linspace(0, 1, n)
    d[:5] = torch.tensor([8.0, 6.0, 4.0, 3.0, 2.5])
    plain = eigsh(Diagonal(d), 4, max_basis=9)
    sliced = eigsh(Diagonal(d, OneSlice(n)), 4, max_basis=9, basis_dtype=torch.float16)
    torch.testing.assert_close(sliced.values, plain.values, rtol=VALUES, atol=0)
    assert sliced.converged.all()


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
@pytest.mark.parametrize("basis_device", [None, "cpu"])
def test_devices(device: str, basis_device: str | None) -> None:
    op = operator(decaying(300), torch.float32)
    there = DenseOperator(op.matrix.to(device))
    result = eigsh(there, 5, basis_device=basis_device, basis_dtype=torch.float16)
    assert result.vectors.device.type == result.residuals.device.type == device
    expected = wanted(decaying(300), 5, "LA").float()
    torch.testing.assert_close(result.values.cpu(), expected, rtol=1e-4, atol=0)


def test_where_a_value_is_lost_in_rounding_it_has_not_converged() -> None:
    """A value far below ||H|| takes many restarts."""
    op = operator(torch.cat([torch.ones(1), 0.01 * 0.9995 ** torch.arange(299)]), torch.float32)
    few = {"max_basis": 9, "check_multiplicity": False}
    assert eigsh(op, 3, **few).converged.all()  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="the rounding of the basis keeps . from it: .* basis_"):
        result = eigsh(op, 3, basis_dtype=torch.float16, **few)  # type: ignore[arg-type]
    assert result.converged[0]
    assert not result.converged[2]


@pytest.mark.parametrize("basis_dtype", [None, torch.float16])
@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-39, 1e-41, 1e-44])
def test_products_about_the_smallest_normal_number(
    size: float, basis_dtype: torch.dtype | None
) -> None:
    """Smaller products count as zero, so that no vector comes from them."""
    op = operator(size * decaying(200), torch.float32)
    result = eigsh(op, 4, basis_dtype=basis_dtype)
    vectors = result.vectors.double()
    error = result.values.double() - wanted(size * decaying(200), 4, "LA")
    assert result.converged.all()
    assert result.orthogonality < 5e-4
    assert (vectors.T @ vectors - torch.eye(4)).abs().max() < 1e-6
    assert error.abs().max() < 4 * torch.finfo(torch.float32).tiny
    assert result.matvecs < 40


def test_the_operators_own_dtype_is_the_default() -> None:
    op = operator(decaying(100))
    result = [eigsh(op, 3, basis_dtype=dtype) for dtype in (None, torch.float64)]
    assert torch.equal(result[0].vectors, result[1].vectors)


@pytest.mark.parametrize(
    ("dtype", "arguments", "message"),
    [
        (torch.float64, {}, "None, or torch.float16 for a float32 operator, not torch.float16"),
        (torch.float32, {"basis_dtype": torch.bfloat16}, "not torch.bfloat16"),
        (torch.float32, {"basis_dtype": torch.float64}, "not torch.float64"),
        (torch.float32, {"criterion": "vector"}, 'use criterion="value"'),
        (torch.float32, {"tol": 1e-7}, "raise tol"),
    ],
)
def test_tolerances_that_a_float16_basis_cannot_meet_raise(
    dtype: torch.dtype, arguments: dict[str, object], message: str
) -> None:
    op = operator(decaying(20), dtype)
    with pytest.raises(ValueError, match=message):
        eigsh(op, 3, **{"basis_dtype": torch.float16, **arguments})  # type: ignore[arg-type]
    assert op.count == 0
