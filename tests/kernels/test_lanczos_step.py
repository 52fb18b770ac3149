"""row_dots and lanczos_step against float64, and the same to the bit whatever runs them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import KernelBackend, columns, same_bits
from eigenfilter import _core, kernels

# Below, at and above the sums taken side by side, blocks and tiles of columns.
SIZES = columns(1, 7, 15, 16, 17, 1000, 2047, 2048, 2049, 5000)
VECTORS = (torch.float32, torch.float64)
COUNTS = (1, 3, 8)
MARGIN = 5


def rows(count: int, size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed + 10 * count + size)
    return torch.randn(count, size, generator=random, dtype=torch.float64).to(device, dtype)


def factors(count: int, device: str = "cpu") -> Tensor:
    return rows(3, count, torch.float64, device, seed=7).contiguous()


def assert_sums_near(result: Tensor, a: Tensor, b: Tensor) -> None:
    """Fail unless sums of products in float64 are right within a few roundings of their terms."""
    terms = (a.double() * b.double()).abs().sum(1)
    error = (result - (a.double() * b.double()).sum(1)).abs()
    assert (error <= 32 * torch.finfo(torch.float64).eps * terms).all()


def assert_row_dots_and_lanczos_step(
    backend: KernelBackend, dtype: torch.dtype, count: int, size: int
) -> None:
    q, w = (rows(count, size, dtype, backend.device, seed) for seed in (1, 2))
    dots, squares = kernels.row_dots(q, w, backend=backend.name)
    assert_sums_near(dots, q, w)
    assert_sums_near(squares, w, w)
    # In memory whose surroundings must stay, and where rows are not aligned.
    f = factors(count, backend.device)
    memory = torch.full((count * size + 2 * MARGIN,), torch.nan, dtype=dtype, device=backend.device)
    u = memory[MARGIN:-MARGIN].view(count, size)
    for target in (u, torch.empty_like(q)):
        target.copy_(rows(count, size, dtype, backend.device, seed=3))
        expected = target.clone()
        kernels.lanczos_step(expected, q, w, f, backend="reference")
        squares, dots = kernels.lanczos_step(target, q, w, f, backend=backend.name)
        assert same_bits(target, expected)
        assert_sums_near(squares, target, target)
        assert_sums_near(dots, target, q)
    assert memory[:MARGIN].isnan().all()
    assert memory[-MARGIN:].isnan().all()


@pytest.mark.parametrize("dtype", VECTORS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(backend: KernelBackend, dtype: torch.dtype, size: int) -> None:
    for count in COUNTS:
        assert_row_dots_and_lanczos_step(backend, dtype, count, size)


def test_the_combination_is_rounded_once() -> None:
    """The result is the nearest float32; products and sums in float32 would err by more."""
    q, w, u = (rows(4, 3000, torch.float32, seed=s) for s in (1, 2, 3))
    f = factors(4)
    exact = (
        f[0, :, None] * w.double() + f[1, :, None] * q.double() + f[2, :, None] * u.double()
    ).float()
    kernels.lanczos_step(u, q, w, f)
    assert same_bits(u, exact)


@pytest.mark.parametrize("dtype", VECTORS, ids=str)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_from_every_instruction_set_and_number_of_threads(dtype: torch.dtype) -> None:
    q, w = (rows(3, 300_001, dtype, seed=s) for s in (1, 2))
    result = []
    for isa in _core.isas():
        _core.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            u = rows(3, 300_001, dtype, seed=3)
            sums = kernels.row_dots(q, w)
            result.append([sums, kernels.lanczos_step(u, q, w, factors(3)), u])
    for other in result[1:]:
        assert all(map(same_bits, other, result[0]))


@pytest.mark.parametrize("shape", [(0, 100), (3, 0)])
def test_nothing_to_do(backend: KernelBackend, shape: tuple[int, int]) -> None:
    empty = torch.empty(shape, device=backend.device)
    f = torch.ones(3, shape[0], dtype=torch.float64, device=backend.device)
    for sums in (
        kernels.row_dots(empty, empty, backend=backend.name),
        kernels.lanczos_step(empty.clone(), empty, empty, f, backend=backend.name),
    ):
        assert sums.shape == (2, shape[0])
        assert not sums.any()


def test_nonfinite_values_come_through_in_their_row(backend: KernelBackend) -> None:
    q, w, u = (rows(3, 100, torch.float32, backend.device, seed) for seed in (1, 2, 3))
    w[1, 50] = torch.inf
    sums = kernels.row_dots(q, w, backend=backend.name)
    assert sums[1].isinf().tolist() == [False, True, False]
    f = torch.ones(3, 3, dtype=torch.float64, device=backend.device)
    sums = kernels.lanczos_step(u, q, w, f, backend=backend.name)
    assert sums[0].isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", VECTORS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_infinities_in_a_tail_stay_infinities(
    backend: KernelBackend, dtype: torch.dtype, size: int
) -> None:
    """A vector or a factor is infinite; what lies beyond the last column is not added."""
    for infinite in range(4):
        u, q, w = (rows(2, size, dtype, backend.device, seed).abs() for seed in (1, 2, 3))
        f = factors(2, backend.device).abs()
        (u[1:, -1:], q[1:, -1:], w[1:, -1:], f[:, 1:])[infinite].fill_(torch.inf)
        expected = u.clone()
        reference = kernels.lanczos_step(expected, q, w, f, backend="reference")
        result = kernels.lanczos_step(u, q, w, f, backend=backend.name)
        assert same_bits(u, expected)
        assert result.isinf().tolist() == [[False, True]] * 2
        torch.testing.assert_close(result, reference, rtol=1e-12, atol=0)


def test_version_counters_are_bumped(backend: KernelBackend) -> None:
    u, q, w = (rows(2, 100, torch.float32, backend.device, seed) for seed in (1, 2, 3))
    before = u._version, q._version, w._version
    kernels.lanczos_step(u, q, w, factors(2, backend.device), backend=backend.name)
    assert u._version > before[0]
    assert (q._version, w._version) == before[1:]


GOOD = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("u", "q", "f", "message"),
    [
        (torch.zeros(2, 4), GOOD, torch.zeros(3, 2).double(), "vectors of one shape"),
        (torch.zeros(10), torch.zeros(10), torch.zeros(3, 10).double(), "vectors of one shape"),
        (torch.zeros(5, 2).T, GOOD, torch.zeros(3, 2).double(), "must be contiguous"),
        (torch.zeros(2, 5).half(), GOOD, torch.zeros(3, 2).double(), "float32 or float64"),
        (
            torch.zeros(2, 5).double(),
            GOOD,
            torch.zeros(3, 2).double(),
            "q is float32 and u is not: .* convert it",
        ),
        (GOOD, GOOD, torch.zeros(3, 2).double(), "share memory"),
        (torch.zeros(2, 5), GOOD, torch.zeros(3, 2), r"factors must be .* \[3, 2\]"),
        (torch.zeros(2, 5), GOOD, torch.zeros(2, 2).double(), r"factors must be .* \[3, 2\]"),
    ],
)
def test_bad_operands_are_refused(u: Tensor, q: Tensor, f: Tensor, message: str) -> None:
    before = u.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.lanczos_step(u, q, torch.zeros(2, 5), f)
    assert torch.equal(u, before)
