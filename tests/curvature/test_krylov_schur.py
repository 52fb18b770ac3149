"""The decomposition H Q = Q T + P B after steps, restarts and locking."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from curvature.dense import DTYPES, DenseOperator, decaying, operator
from eigenfilter.curvature.solvers.krylov_schur import KrylovSchur, Ritz


def build_run(op: DenseOperator, steps: int, rows: int, width: int) -> KrylovSchur:
    run = KrylovSchur(op, rows, width, seed=3)
    run.start()
    for _ in range(steps):
        run.step(width)
    return run


class RitzTensors(NamedTuple):
    values: Tensor
    vectors: Tensor
    residuals: Tensor
    residual_slack: Tensor
    coupling: Tensor


def tensors(ritz: Ritz) -> RitzTensors:
    return RitzTensors(*map(torch.from_numpy, ritz))


def assert_krylov_identity(op: DenseOperator, run: KrylovSchur, of: Ritz) -> None:
    """Fail unless the basis is orthonormal and H Q S - Q S Theta = P B, the Krylov identity."""
    ritz = tensors(of)
    scale = 40 * torch.finfo(op.dtype).eps
    basis = run.basis.rows[: run.end].double()
    assert (basis @ basis.T - torch.eye(run.end)).abs().max() < scale
    q, p = basis[run.num_locked : run.size].T, basis[run.size :].T
    pairs = q @ ritz.vectors
    residual = op.matrix.double() @ pairs - pairs * ritz.values
    norm = 31
    assert (residual - p @ (p.T @ residual)).norm(dim=0).max() < norm * scale
    torch.testing.assert_close(residual.norm(dim=0), ritz.residuals, rtol=1e-5, atol=norm * scale)
    assert residual.norm() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_decomposition_holds_through_steps_and_restarts(dtype: torch.dtype, width: int) -> None:
    op = operator(decaying(200), dtype)
    run = build_run(op, 8, 8 * width, width)
    for _ in range(4):
        ritz = run.solve()
        assert_krylov_identity(op, run, ritz)
        assert (run.size, run.end) == (8 * width, 9 * width)
        assert run.full
        indices = np.array([0, 2, 5, len(ritz.values) - 1])
        run.restart(ritz, indices)
        after = run.solve()
        assert_krylov_identity(op, run, after)
        np.testing.assert_allclose(after.values, ritz.values[indices], atol=1e-7)
        np.testing.assert_allclose(after.residuals, ritz.residuals[indices], atol=1e-7)
        while not run.full:
            run.step(width)
        while run.size < 8 * width:
            run.step(8 * width - run.size)
    assert run.products == op.count


def test_t_is_tridiagonal_before_a_restart_and_banded_for_blocks() -> None:
    for width in (1, 3):
        run = build_run(operator(decaying(200)), 6, 40, width)
        ritz = tensors(run.solve())
        t = ritz.vectors * ritz.values @ ritz.vectors.T
        assert (t - t.tril(width).triu(-width)).abs().max() < 1e-12
        assert t.diagonal(width).abs().min() > 0.1


def test_locked_vectors_take_no_part_until_unlocked() -> None:
    op = operator(decaying(200))
    run = build_run(op, 12, 30, 1)
    ritz = run.solve()
    kept = np.array([9, 2])
    expected = run.vectors(ritz, kept)
    residuals = ritz.residuals[kept]
    run.lock(ritz, kept)
    torch.testing.assert_close(run.basis.rows[:2].T, expected)
    assert (run.num_locked, run.size, run.end) == (2, 2, 2)
    run.start()
    for _ in range(5):
        run.step(1)
    pairs = run.vectors(run.solve(), np.arange(2, 7))
    ritz = tensors(run.solve())
    assert (expected.T @ pairs).abs().max() < 1e-13
    left = op.matrix @ pairs - pairs * ritz.values
    outside = (left - expected @ (expected.T @ left)).norm(dim=0)
    assert (left.norm(dim=0) - outside).max() > 1e-4
    torch.testing.assert_close(ritz.residuals, outside, rtol=1e-10, atol=0)
    run.unlock(residuals)
    ritz = tensors(run.solve())
    q = run.basis.rows[:7].T
    torch.testing.assert_close(ritz.values, torch.linalg.eigvalsh(q.T @ op.matrix @ q))
    pairs = run.vectors(run.solve(), np.arange(7))
    measured = (op.matrix @ pairs - pairs * ritz.values).norm(dim=0)
    assert (measured <= ritz.residuals * (1 + 1e-12)).all()
    assert (measured >= ritz.residuals - 2 * ritz.residual_slack - 1e-12).all()


@pytest.mark.parametrize("width", [1, 2])
def test_the_basis_ends_with_an_invariant_subspace(width: int) -> None:
    run = build_run(operator(torch.tensor([5.0] * 3 + [1.0] * 20)), 3, 30, width)
    ritz = run.solve()
    assert run.products == 3 * width
    if width == 2:  # only one of the two that wait is rounding
        assert (run.size, run.end) == (3, 4)
        run.step(2)
        ritz = run.solve()
    assert run.closed
    assert run.size == 2 * width
    np.testing.assert_allclose(ritz.values, [1.0] * width + [5.0] * width, rtol=1e-7)


def test_a_start_is_near_v0() -> None:
    run = KrylovSchur(operator(decaying(50)), 10, 2, seed=1)
    starts: Tensor = torch.eye(50, dtype=torch.float64)[:2] * torch.tensor([[3.0], [1e-3]])
    run.start(starts)
    cosines = (run.basis.rows[:2] * starts).sum(1) / starts.norm(dim=1)
    assert (cosines > 0.98).all()
    assert (cosines < 0.9999).all()
