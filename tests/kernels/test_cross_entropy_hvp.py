"""cross_entropy_hvp against exact numbers, and what it must not read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import KernelBackend, columns, same_bits
from eigenfilter import _core, kernels
from tolerances import KERNELS, assert_near, exact, softmax_roundings

# Below, at and above the sums taken side by side, registers, blocks and tiles of columns.
SIZES = columns(1, 3, 15, 16, 17, 1000, 2047, 2048, 2049, 5000)
WIDE = (torch.float32, torch.float64)
SCALES = (0.3, 0.0, -2.1, 1e-4, 7.0)
MARGIN = 5


def problem(
    size: int, dtype: torch.dtype, device: str = "cpu", spread: float = 6.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, vectors and scales of as many rows as there are SCALES."""
    random = torch.Generator().manual_seed(size)
    z, u = torch.randn(2, len(SCALES), size, generator=random, dtype=torch.float64)
    scales = torch.tensor(SCALES, dtype=torch.float64)
    return (spread * z).to(device, dtype), u.to(device, dtype), scales.to(device)


def inside(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `t` in memory with margins of NaN, where rows are not aligned; and that memory."""
    memory = torch.full((t.numel() + 2 * MARGIN,), torch.nan, dtype=t.dtype, device=t.device)
    copy = memory[MARGIN:-MARGIN].view(t.shape)
    copy.copy_(t)
    return copy, memory


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_against_exact_numbers(backend: KernelBackend, dtype: torch.dtype, size: int) -> None:
    z, u, scales = problem(size, dtype, backend.device)
    Z, U, s = exact(z), exact(u), exact(scales)[:, None]
    p = np.exp(Z - Z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mean = (p * U).sum(1, keepdims=True)
    typical = (p * np.abs(U)).sum(1, keepdims=True)
    roundings = softmax_roundings(Z, p)
    out, memory = inside(u)
    kernels.cross_entropy_hvp(z, u, scales, out=out, backend=backend.name)
    in_place, memory_of_u = inside(u)
    returned, _ = kernels.cross_entropy_hvp(z, in_place, scales, out=in_place, backend=backend.name)
    assert returned is in_place
    product, means = kernels.cross_entropy_hvp(z, u, scales, backend=backend.name)
    for result in (out, in_place, product):
        terms = np.abs(s) * p * (np.abs(U) + typical)
        assert_near(result, s * p * (U - mean), terms, roundings)
    bound = (roundings.max(1) * KERNELS[dtype].unit) * typical[:, 0]
    assert (np.abs(exact(means) - mean[:, 0]) <= bound)[np.array(SCALES) != 0].all()
    assert means[1] == 0
    for around in (memory, memory_of_u):
        assert around[:MARGIN].isnan().all()
        assert around[-MARGIN:].isnan().all()


def test_it_is_the_second_derivative_of_cross_entropy(backend: KernelBackend) -> None:
    z, u, _ = problem(600, torch.float64, backend.device)
    target = torch.tensor([3, 0, 599, -100, 17], device=backend.device)
    z.requires_grad_()
    loss = torch.nn.functional.cross_entropy(z, target)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, z, u)
    counts = (target != -100).double()
    scales = counts / counts.sum()
    product, means = kernels.cross_entropy_hvp(z.detach(), u, scales, backend=backend.name)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close((means + 0), (z.softmax(1) * u).sum(1).detach() * (scales != 0))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_from_every_instruction_set_and_number_of_threads(dtype: torch.dtype) -> None:
    z, u, scales = problem(500_003, dtype)
    results = []
    for isa in _core.isas():
        _core.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.cross_entropy_hvp(z, u, scales))
    copy = u.clone()
    results.append(kernels.cross_entropy_hvp(z, copy, scales, out=copy))
    for product, means in results[1:]:
        assert same_bits(product, results[0][0])
        assert same_bits(means, results[0][1])


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rows_that_do_not_count_are_not_read(
    backend: KernelBackend, dtype: torch.dtype, size: int
) -> None:
    z, u, scales = problem(size, dtype, backend.device)
    z[1], u[1] = torch.nan, torch.inf
    product, means = kernels.cross_entropy_hvp(z, u, scales, backend=backend.name)
    assert not product[1].any()
    assert means[1] == 0
    assert product.isfinite().all()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_every_mean_is_written(backend: KernelBackend, dtype: torch.dtype) -> None:
    z, u, scales = problem(2500, dtype, backend.device)
    expected, means = kernels.cross_entropy_hvp(z, u, scales, backend=backend.name)
    out, written = torch.full_like(u, torch.nan), torch.full_like(means, torch.nan)
    kernels.Backend(backend.name).cross_entropy_hvp(out, z, scales, written, u)
    assert same_bits(out, expected)
    assert same_bits(written, means)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_logits_at_the_ends_of_their_dtype(backend: KernelBackend, dtype: torch.dtype) -> None:
    """Masked classes, by minus infinity or the least number, have no part; others keep theirs."""
    size = 3000
    least, greatest = torch.finfo(dtype).min, torch.finfo(dtype).max
    z, u, scales = problem(size, dtype, backend.device, spread=1.0)
    scales[1] = 1.0
    few = slice(2100, 2104)
    masks = (-torch.inf, least, -torch.inf, least, -1e30)
    masked = torch.tensor(masks, dtype=dtype, device=z.device)[:, None].repeat(1, size)
    masked[:, few] = z[:, few]
    masked[4] = masked[4] + greatest / 2
    product, means = kernels.cross_entropy_hvp(masked, u, scales, backend=backend.name)
    alone, alone_means = kernels.cross_entropy_hvp(
        masked[:, few].contiguous(), u[:, few].contiguous(), scales, backend=backend.name
    )
    rtol = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(product[:4, few], alone[:4], rtol=rtol, atol=0)
    torch.testing.assert_close(means[:4], alone_means[:4], rtol=rtol, atol=0)
    product[:4, few] = 0
    assert not product[:4].any()
    # All logits are equal where a number as large as half of the greatest is added.
    expected = scales[4] / size * (u[4].double() - u[4].double().mean())
    torch.testing.assert_close(product[4].double(), expected, rtol=1e-4, atol=1e-6)


def test_what_is_no_number_stays_in_its_row(backend: KernelBackend) -> None:
    z, u, scales = problem(2500, torch.float32, backend.device)
    scales[1] = 1.0
    z[0, 2400], z[2, 7], z[4] = torch.nan, torch.inf, -torch.inf
    product, means = kernels.cross_entropy_hvp(z, u, scales, backend=backend.name)
    assert product.isnan().all(1).tolist() == [True, False, True, False, True]
    assert product.isfinite().all(1).tolist() == [False, True, False, True, False]
    assert means.isnan().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("shape", [(0, 100), (3, 0)])
def test_nothing_to_do(backend: KernelBackend, shape: tuple[int, int]) -> None:
    empty = torch.empty(shape, device=backend.device)
    scales = torch.ones(shape[0], dtype=torch.float64, device=backend.device)
    product, means = kernels.cross_entropy_hvp(empty, empty.clone(), scales, backend=backend.name)
    assert product.shape == shape
    assert not means.any()


def test_version_counters_are_bumped(backend: KernelBackend) -> None:
    z, u, scales = problem(100, torch.float32, backend.device)
    before = z._version, u._version, scales._version
    kernels.cross_entropy_hvp(z, u, scales, backend=backend.name)
    assert (z._version, u._version, scales._version) == before
    kernels.cross_entropy_hvp(z, u, scales, out=u, backend=backend.name)
    assert u._version > before[1]
    assert (z._version, scales._version) == (before[0], before[2])


GOOD = torch.zeros(2, 5)
ONES = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("z", "u", "scales", "message"),
    [
        (torch.zeros(2, 4), GOOD, ONES, "vectors of one shape"),
        (torch.zeros(5, 2).T, GOOD, ONES, "must be contiguous|vectors of one shape"),
        (torch.zeros(2, 5).double(), GOOD, ONES, "logits is float64 and out is not"),
        (torch.zeros(2, 5).half(), GOOD.half(), ONES, "float32 or float64"),
        (GOOD, torch.zeros(2, 5), ONES.float(), r"scales must be .* float64 .* \[2\]"),
        (GOOD, torch.zeros(2, 5), ONES[:1], r"scales must be .* \[2\]"),
        (torch.zeros(5), torch.zeros(5), ONES, r"out must be \[b, n\]"),
    ],
)
def test_bad_operands_are_refused(z: Tensor, u: Tensor, scales: Tensor, message: str) -> None:
    before = u.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.cross_entropy_hvp(z, u, scales, out=u)
    assert torch.equal(u, before)


def test_results_that_overlap_are_refused() -> None:
    memory = torch.zeros(3, 5)
    for out, z, u in (
        (memory[:2], memory[1:], torch.zeros(2, 5)),
        (memory[:2], torch.zeros(2, 5), memory[1:]),
        (GOOD, GOOD, torch.zeros(2, 5)),
    ):
        with pytest.raises(ValueError, match="share memory"):
            kernels.cross_entropy_hvp(z, u, ONES, out=out)
