"""gram, mix_rows and what they make together, the orthonormalization of a block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import KernelBackend, columns, same_bits
from eigenfilter import _core, kernels

# Below, at and above the sums taken side by side, what is in double at once, blocks and tiles.
SIZES = columns(1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 2049, 9000)
VECTORS = (torch.float32, torch.float64)
COUNTS = (1, 3, 8, 32)
ROUNDINGS = 32


def rows(count: int, size: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    random = torch.Generator().manual_seed(10 * count + size)
    return torch.randn(count, size, generator=random, dtype=torch.float64).to(device, dtype)


def conditioned(condition: float, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows whose singular values go from 1 down to 1 / condition."""
    random = torch.Generator().manual_seed(size)
    shapes = (size, count), (count, count)
    u, v = (torch.linalg.qr(torch.randn(s, generator=random).double()).Q for s in shapes)
    values = condition ** -torch.linspace(0, 1, count, dtype=torch.float64)
    return ((v * values) @ u.T).to(dtype).contiguous()


def assert_gram_and_mix_rows(
    backend: KernelBackend, dtype: torch.dtype, count: int, size: int
) -> None:
    v = rows(count, size, dtype, backend.device)
    result = kernels.gram(v, backend=backend.name)
    for products, row in zip(result, v.double(), strict=True):
        terms = v.double() * row  # summed pairwise; the reference's one by one
        bound = 256 * torch.finfo(torch.float64).eps * terms.abs().sum(1)
        assert ((products - terms.sum(1)).abs() <= bound).all()
    assert same_bits(result, result.T.contiguous())
    f = rows(count, count, torch.float64, backend.device)
    expected = v.clone()
    kernels.mix_rows(expected, f, backend="reference")
    kernels.mix_rows(v, f, backend=backend.name)
    assert same_bits(v, expected)


def deviation(v: Tensor, alive: int) -> float:
    """Return max |V V^T - I|, rows of zeros left out; fail unless so many are not zero."""
    saved = v[v.any(1)].double()
    assert len(saved) == alive
    return float((saved @ saved.T - torch.eye(alive).to(saved)).abs().max())


def loss(before: Tensor, lower: Tensor, v: Tensor) -> float:
    """Return the largest |row of V - L V'|, relative to the row of V."""
    off = (lower @ v.double() - before.double()).norm(dim=1)
    return float((off / before.double().norm(dim=1).clamp_min(1e-300)).max())


@pytest.mark.parametrize("dtype", VECTORS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(backend: KernelBackend, dtype: torch.dtype, size: int) -> None:
    for count in COUNTS:
        assert_gram_and_mix_rows(backend, dtype, count, size)


@pytest.mark.parametrize("dtype", VECTORS, ids=str)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_from_every_instruction_set_and_number_of_threads(dtype: torch.dtype) -> None:
    result = []
    for isa in _core.isas():
        _core.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            v = rows(5, 300_001, dtype)
            g = kernels.gram(v)
            kernels.mix_rows(v, g)
            result.append([g, v])
    for other in result[1:]:
        assert all(map(same_bits, other, result[0]))


@pytest.mark.parametrize("dtype", VECTORS, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_any_condition(backend: KernelBackend, dtype: torch.dtype, condition: float) -> None:
    """No worse than torch's QR, up to a few roundings; and lower triangular."""
    before = conditioned(condition, 8, 3000, dtype).to(backend.device)
    v = before.clone()
    lower = kernels.cholesky_qr(v, backend=backend.name)
    q = torch.linalg.qr(before.T).Q.T
    eps = torch.finfo(dtype).eps
    assert deviation(v, 8) <= deviation(q, 8) + ROUNDINGS * eps
    assert loss(before, lower, v) <= ROUNDINGS * eps * (1 if condition == 1 else condition**0.25)
    assert same_bits(lower, lower.tril())
    assert (lower.diagonal() > 0).all()


def test_float64_at_a_condition_that_its_gram_matrix_does_not_see(backend: KernelBackend) -> None:
    before = conditioned(1e12, 8, 3000, torch.float64).to(backend.device)
    v = before.clone()
    kernels.cholesky_qr(v, backend=backend.name)
    assert deviation(v, 8) < 1e-14


@pytest.mark.parametrize("dtype", VECTORS, ids=str)
def test_rows_that_depend_on_others_become_zero(backend: KernelBackend, dtype: torch.dtype) -> None:
    before = rows(8, 3000, dtype, backend.device)
    before[2] = 0
    before[4] = before[1]  # to the bit
    before[6] = 0.5 * before[0] - 4 * before[3]  # except for rounding, which may count as its own
    v = before.clone()
    lower = kernels.cholesky_qr(v, backend=backend.name)
    assert not v[[2, 4]].any()
    assert not lower.diagonal()[[2, 4]].any()
    eps = torch.finfo(dtype).eps
    assert deviation(v, 5 + bool(v[6].any())) < ROUNDINGS * eps
    assert loss(before, lower, v) < ROUNDINGS * eps
    assert lower.diagonal()[6] < 8 * eps * before[6].double().norm()


def test_all_zero_and_nothing(backend: KernelBackend) -> None:
    v = torch.zeros(3, 100, device=backend.device)
    assert not kernels.cholesky_qr(v, backend=backend.name).any()
    assert not v.any()
    for shape in ((0, 100), (3, 0)):
        empty = torch.empty(shape, device=backend.device)
        assert kernels.cholesky_qr(empty, backend=backend.name).shape == (shape[0], shape[0])


def test_lengths_do_not_matter(backend: KernelBackend) -> None:
    """Rows of very different lengths lose nothing to each other."""
    v = rows(4, 1000, torch.float32, backend.device)
    v *= torch.tensor([1e-15, 1e15, 1.0, 1e-20], device=backend.device)[:, None]
    kernels.cholesky_qr(v, backend=backend.name)
    assert deviation(v, 4) < 1e-6


@pytest.mark.parametrize("power", [-950, -600, 600, 1015])
def test_lengths_of_which_squares_are_no_numbers(backend: KernelBackend, power: int) -> None:
    """A power of two, also one a row, changes nothing but the lengths."""
    v = rows(4, 300, torch.float64, backend.device)
    v[3] = v[0] - v[1]
    sizes = torch.ldexp(torch.ones(4).to(v), torch.tensor([power, power // 2, power, power]).to(v))
    scaled = (sizes[:, None] * v).contiguous()
    expected = kernels.cholesky_qr(v, backend=backend.name)
    result = kernels.cholesky_qr(scaled, backend=backend.name)
    assert result[3, 3] == 0
    assert same_bits(scaled, v)
    assert same_bits(result, sizes[:, None] * expected)


def test_slices_are_added_up(backend: KernelBackend) -> None:
    """Where another process holds as much again, all inner products are twice as large."""
    v = conditioned(1e4, 5, 2000, torch.float32).to(backend.device)
    alone = v.clone()
    expected = kernels.cholesky_qr(alone, backend=backend.name)
    lower = kernels.cholesky_qr(v, total=lambda g: 2 * g, backend=backend.name)
    torch.testing.assert_close(lower, 2**0.5 * expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(v, alone / 2**0.5, rtol=1e-3, atol=1e-6)


def test_nonfinite_values_come_through(backend: KernelBackend) -> None:
    v = rows(3, 100, torch.float32, backend.device)
    v[1, 50] = torch.nan
    lower = kernels.cholesky_qr(v, backend=backend.name)
    assert lower.isnan().any()
    assert v[1].isnan().any()


@pytest.mark.parametrize(
    ("v", "f", "message"),
    [
        (torch.zeros(33, 5), torch.zeros(33, 33).double(), "at most 32"),
        (torch.zeros(5), torch.zeros(1, 1).double(), r"must be \[b, n\]"),
        (torch.zeros(5, 2).T, torch.zeros(2, 2).double(), "must be contiguous"),
        (torch.zeros(2, 5).half(), torch.zeros(2, 2).double(), "float32 or float64"),
        (torch.zeros(2, 5), torch.zeros(2, 2), r"factors must be .* \[2, 2\]"),
    ],
)
def test_bad_operands_are_refused(v: Tensor, f: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.mix_rows(v, f)
    if "factors" not in message:
        with pytest.raises((ValueError, TypeError), match=message):
            kernels.cholesky_qr(v)
