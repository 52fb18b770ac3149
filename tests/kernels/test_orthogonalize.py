"""orthogonalize against float64, and the same to the bit whatever runs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import KernelBackend, columns, same_bits
from eigenfilter import _core, kernels

# Below, at and above registers, groups and blocks of columns.
SIZES = columns(1, 7, 15, 16, 17, 63, 64, 65, 1000, 2048, 2049, 5000)
VECTORS = (torch.float32, torch.float64)


def orthonormal(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """min(rows, columns) orthonormal rows, rounded to a dtype."""
    random = torch.Generator().manual_seed(rows + columns)
    q, _ = torch.linalg.qr(
        torch.randn(columns, min(rows, columns), generator=random, dtype=torch.float64)
    )
    return q.T.contiguous().to(device, dtype)


def vectors(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)


def exact(w: Tensor, basis: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    w, Q = w.double(), basis.double()
    total = torch.zeros((*w.shape[:-1], len(Q)), dtype=torch.float64, device=w.device)
    for _ in range(passes):
        c = w @ Q.T
        total, w = total + c, w - c @ Q
    return w, total, torch.linalg.vector_norm(w, dim=-1)


def assert_orthogonalizes(
    backend: KernelBackend, dtype: torch.dtype, vector: torch.dtype, rows: int, size: int
) -> None:
    """Fail unless w is right within a few roundings; its elements are of size 1.

    In float64 no wider type is left to subtract in: each row that is taken off, in each pass,
    rounds by half a unit of what the element consists of.
    """
    eps = torch.finfo(vector).eps
    basis = orthonormal(rows, size, dtype, backend.device)
    for shape in ((size,), (3, size)):
        for passes in (1, 2):
            w = vectors(shape, vector, backend.device)
            expected, total, norm = exact(w, basis, passes)
            allowed = torch.full_like(expected, 8 * eps)
            if vector == torch.float64:
                terms = w.abs() + total.abs() @ basis.double().abs()
                allowed = (4 + passes * rows / 2 * terms) * eps
            c, norms = kernels.orthogonalize(w, basis, passes=passes, backend=backend.name)
            scale = eps * size**0.5
            torch.testing.assert_close(c, total, rtol=0, atol=4 * scale)
            assert ((w.double() - expected).abs() <= allowed).all()
            torch.testing.assert_close(norms, norm, rtol=0, atol=8 * scale)


@pytest.mark.parametrize("vector", VECTORS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(
    backend: KernelBackend, dtype: torch.dtype, vector: torch.dtype, size: int
) -> None:
    for rows in (1, 3, 4, 9):
        assert_orthogonalizes(backend, dtype, vector, rows, size)


def test_what_is_left_is_orthogonal_after_two_passes(backend: KernelBackend) -> None:
    """The vector lies almost in the span, and one pass leaves roundings of its length."""
    basis = orthonormal(40, 3000, torch.float64, backend.device)
    inside = basis.sum(0) + 1e-9 * vectors((3000,), torch.float64, backend.device)
    overlaps = []
    for passes in (1, 2):
        w = inside.clone()
        _, norm = kernels.orthogonalize(w, basis, passes=passes, backend=backend.name)
        overlaps.append(float((basis @ w).abs().max() / norm))
    assert overlaps[1] < 1e-14 < overlaps[0]


def test_no_rows(backend: KernelBackend) -> None:
    w = vectors((100,), torch.float32, backend.device)
    before = w.clone()
    c, norm = kernels.orthogonalize(w, w.new_empty(0, 100), backend=backend.name)
    assert c.shape == (0,)
    assert same_bits(w, before)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(w.double()))


@pytest.mark.parametrize("shape", [(0, 100), (3, 0), (0,)])
def test_nothing_to_project(backend: KernelBackend, shape: tuple[int, ...]) -> None:
    w = torch.empty(shape, device=backend.device)
    basis = torch.empty(2, shape[-1], device=backend.device)
    c, norms = kernels.orthogonalize(w, basis, backend=backend.name)
    assert c.shape == (*shape[:-1], 2)
    assert norms.shape == shape[:-1]
    assert not c.any()
    assert not norms.any()


def test_memory_that_is_shared_is_refused(backend: KernelBackend) -> None:
    rows = orthonormal(6, 100, torch.float32, backend.device)
    before = rows.clone()
    with pytest.raises(ValueError, match=r"shares? memory"):
        kernels.orthogonalize(rows[4:6], rows, backend=backend.name)
    assert same_bits(rows, before)
    kernels.orthogonalize(rows[5], rows[:5], backend=backend.name)  # side by side


@pytest.mark.parametrize("vector", VECTORS, ids=str)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_from_every_instruction_set_and_number_of_threads(
    dtype: torch.dtype, vector: torch.dtype
) -> None:
    basis = orthonormal(9, 5000, dtype).repeat(1, 40)
    result = []
    for isa in _core.isas():
        _core.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            w = vectors((2, basis.shape[1]), vector)
            result.append([w, *kernels.orthogonalize(w, basis)])
    for other in result[1:]:
        assert all(map(same_bits, other, result[0]))


def test_nonfinite_values_come_through(backend: KernelBackend) -> None:
    basis = orthonormal(3, 100, torch.float32, backend.device)
    w = vectors((100,), torch.float32, backend.device)
    w[50] = torch.nan
    c, norm = kernels.orthogonalize(w, basis, backend=backend.name)
    assert c.isnan().all()
    assert norm.isnan()


def test_version_counters_are_bumped(backend: KernelBackend) -> None:
    w = vectors((100,), torch.float32, backend.device)
    before = w._version
    kernels.orthogonalize(
        w, orthonormal(2, 100, torch.float32, backend.device), backend=backend.name
    )
    assert w._version > before


@pytest.mark.parametrize(
    ("w", "basis", "options", "message"),
    [
        (torch.zeros(5), torch.zeros(2, 4), {}, r"w \[n\] or \[b, n\]"),
        (torch.zeros(2, 2, 5), torch.zeros(2, 5), {}, r"w must be \[n\] or \[b, n\]"),
        (torch.zeros(5), torch.zeros(5), {}, r"basis must be \[m, n\]"),
        (torch.zeros(10)[::2], torch.zeros(2, 5), {}, "must be contiguous"),
        (torch.zeros(5), torch.zeros(5, 2).T, {}, "must be contiguous"),
        (torch.zeros(5), torch.zeros(2, 5), {"passes": 0}, "passes must be .* at least 1"),
        (torch.zeros(5), torch.zeros(2, 5, device="meta"), {}, "basis cannot be used"),
        (torch.zeros(5, dtype=torch.half), torch.zeros(2, 5), {}, "w must be float32 or float64"),
        (torch.zeros(5), torch.zeros(2, 5, dtype=torch.int32), {}, "int32"),
        (torch.zeros(5), torch.zeros(2, 5, dtype=torch.int32), {"backend": "reference"}, "int32"),
        (torch.zeros(65_536, 1), torch.zeros(2, 1), {}, "at most 65535"),
    ],
)
def test_bad_operands_are_refused(w: Tensor, basis: Tensor, options: dict, message: str) -> None:
    before = w.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.orthogonalize(w, basis, **options)
    assert same_bits(w, before)
