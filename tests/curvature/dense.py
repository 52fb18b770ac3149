"""Dense symmetric matrices as operators, and the results that solvers should return for them."""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfilter.curvature import EigenResult

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

    def matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        return self.matrix @ V


class OneSlice:
    """A single slice that is the whole vector; counts the sums over slices."""

    number, count = 0, 1

    def __init__(self, length: int) -> None:
        self.length = length
        self.sums = 0

    def sum(self, t: Tensor) -> Tensor:
        self.sums += 1
        return t


class Diagonal:
    """A diagonal matrix as an operator, on slices if `slices` is passed."""

    device = torch.device("cpu")

    def __init__(self, d: Tensor, slices: OneSlice | None = None) -> None:
        self.shape = len(d), len(d)
        self.dtype = d.dtype
        self.slices = slices
        self._d = d

    def matvec(self, v: Tensor) -> Tensor:
        return self._d * v

    def matmat(self, V: Tensor) -> Tensor:
        return self._d[:, None] * V


def operator(spectrum: Tensor, dtype: torch.dtype = torch.float64, seed: int = 5) -> DenseOperator:
    """Return an operator with this spectrum and random eigenvectors."""
    n = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, n, dtype=torch.float64, generator=generator)
    vectors = torch.linalg.qr(normal).Q
    matrix = (vectors * spectrum.double()) @ vectors.T
    return DenseOperator(((matrix + matrix.T) / 2).to(dtype))


def wanted(spectrum: Tensor, k: int, which: str) -> Tensor:
    """Return the values that eigsh should return, in its order, from the spectrum."""
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


def assert_eigenpairs(op: DenseOperator, result: EigenResult, expected: Tensor, tol: float) -> None:
    """Fail unless all pairs converged, are the expected ones, and their error bounds hold."""
    rounding = 40 * torch.finfo(op.dtype).eps * float(torch.linalg.matrix_norm(op.matrix, 2))
    matrix, vectors = op.matrix.double(), result.vectors.double()
    values, residuals = result.values.double(), result.residuals.double()
    k = len(expected)
    measured = (matrix @ vectors - vectors * values).norm(dim=0)
    assert result.converged.all()
    assert {result.values.dtype, result.vectors.dtype, result.residuals.dtype} == {op.dtype}
    assert result.vectors.shape == (op.shape[0], k)
    assert ((values - expected).abs() <= tol * expected.abs() + rounding).all()
    assert (measured <= residuals + rounding).all()
    assert (result.errors <= result.residuals).all()
    unit = 100 * torch.finfo(op.dtype).eps
    assert (vectors.T @ vectors - torch.eye(k)).abs().max() < unit
    assert result.orthogonality < unit
    assert result.matvecs == op.count
    assert 0 <= result.multiplicity_matvecs < result.matvecs
