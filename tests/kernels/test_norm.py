"""norm against exact sums, and the same to the bit whatever runs it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cases import SCALE, Arena, KernelBackend
from eigenfilter import _core, kernels
from tolerances import NORM


def tensors(dtype: torch.dtype, device: str = "cpu", shift: int = 0) -> list[Tensor]:
    arena = Arena(dtype, 1, device=device, shifts=[shift])
    arena.fill(0)
    return arena.lists[0]


def exact_norm(lists: list[Tensor], weights: list[Tensor] | None) -> float:
    values = torch.cat(lists).double()
    if weights is not None:
        values *= torch.cat(weights).double()
    return math.sqrt(math.fsum(v * v for v in values.tolist()))


weightings = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


@weightings
@pytest.mark.parametrize("scale", [None, SCALE])
def test_norm(
    backend: KernelBackend, dtype: torch.dtype, scale: float | None, weighted: bool
) -> None:
    lists = tensors(dtype, backend.device)
    weights = tensors(dtype, backend.device, 1) if weighted else None
    grad_scale = None if scale is None else torch.tensor([scale], device=backend.device)
    result = kernels.norm(lists, weights=weights, grad_scale=grad_scale, backend=backend.name)
    exact = exact_norm(lists, weights)
    if grad_scale is not None:
        exact /= grad_scale.item()
    assert result.shape == ()
    assert result.device == lists[0].device
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.item() == pytest.approx(exact, rel=NORM[dtype], abs=0)


def test_out_is_filled_and_returned(backend: KernelBackend, dtype: torch.dtype) -> None:
    lists = tensors(dtype, backend.device)
    expected = kernels.norm(lists, backend=backend.name)
    out = torch.full_like(expected, torch.nan)
    assert kernels.norm(lists, out=out, backend=backend.name) is out
    assert torch.equal(out, expected)


@weightings
@pytest.mark.usefixtures("threads")
def test_the_same_bits_from_every_instruction_set_alignment_and_number_of_threads(
    dtype: torch.dtype, weighted: bool
) -> None:
    results = set()
    values, factors = tensors(dtype), tensors(dtype)
    for shift in (0, 1, 7):
        lists = tensors(dtype, shift=shift)
        torch._foreach_copy_(lists, values)
        weights = tensors(dtype, shift=shift // 2) if weighted else None
        if weights is not None:
            torch._foreach_copy_(weights, factors)
        for isa in _core.isas():
            _core.set_isa(isa)
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                results.add(kernels.norm(lists, weights=weights, backend="native").item())
    assert len(results) == 1
    assert results.pop() > 100


@pytest.mark.gpu
@weightings
@pytest.mark.parametrize("backend_name", ["native", "triton"])
def test_the_same_bits_from_run_to_run_on_a_gpu(
    dtype: torch.dtype, backend_name: str, weighted: bool
) -> None:
    if backend_name == "native" and not _core.cuda_compiled:
        pytest.skip("built without CUDA kernels")
    lists = tensors(dtype, "cuda")
    weights = tensors(dtype, "cuda") if weighted else None
    results = {kernels.norm(lists, weights=weights, backend=backend_name).item() for _ in range(20)}
    assert len(results) == 1


@weightings
def test_alignment_does_not_change_the_sum(
    fast_backend: KernelBackend, dtype: torch.dtype, weighted: bool
) -> None:
    """The result is float64 for every dtype: a narrower one would hide another order."""
    for _ in range(3):
        aligned = [t.clone() for t in tensors(dtype, fast_backend.device)]
        factors = [t.clone() for t in tensors(dtype, fast_backend.device)]
        lists, weights = (tensors(dtype, fast_backend.device, 1) for _ in range(2))
        torch._foreach_copy_(lists, aligned)
        torch._foreach_copy_(weights, factors)
        results = set()
        for inputs, by in ((aligned, factors), (lists, weights)):
            out = torch.empty((), dtype=torch.float64, device=fast_backend.device)
            options = {"weights": by if weighted else None, "backend": fast_backend.name}
            results.add(kernels.norm(inputs, out=out, **options).item())
        assert len(results) == 1


def test_more_chunks_than_are_added_at_once(
    fast_backend: KernelBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's last program takes as many as its block has; a smaller block stands for many."""
    if fast_backend.name == "triton":
        from eigenfilter.kernels.triton import norm

        monkeypatch.setattr(norm, "NORM_BLOCK", 4)
    t = torch.randn(9 * 4096, device=fast_backend.device)
    result = kernels.norm([t], backend=fast_backend.name)
    assert result.item() == pytest.approx(exact_norm([t], None), rel=NORM[torch.float32])


def test_weights_of_one_are_none(backend: KernelBackend, dtype: torch.dtype) -> None:
    lists = tensors(dtype, backend.device)
    ones = [torch.ones_like(t) for t in lists]
    for scale in (None, torch.tensor(SCALE, device=backend.device)):
        plain, weighted = (
            kernels.norm(lists, weights=weights, grad_scale=scale, backend=backend.name)
            for weights in (None, ones)
        )
        assert torch.equal(weighted, plain)


def test_weights_may_be_the_tensors(backend: KernelBackend, dtype: torch.dtype) -> None:
    lists = tensors(dtype, backend.device)
    result = kernels.norm(lists, weights=lists, backend=backend.name)
    assert result.item() == pytest.approx(exact_norm(lists, lists), rel=NORM[dtype], abs=0)


def test_squares_beyond_the_range_of_float32(fast_backend: KernelBackend) -> None:
    for value in (1e30, 1e-30):
        t = torch.full((40,), value, device=fast_backend.device)
        result = kernels.norm([t], backend=fast_backend.name)
        assert result.item() == pytest.approx(value * math.sqrt(40), rel=1e-6)


@pytest.mark.parametrize(("value", "scale"), [(1e30, 1e35), (1e-30, 1e-35)])
def test_products_with_weights_beyond_the_range_of_float32(
    backend: KernelBackend, value: float, scale: float
) -> None:
    t, w = (torch.full((40,), value, device=backend.device) for _ in range(2))
    grad_scale = torch.tensor(scale, device=backend.device)
    result = kernels.norm([t], weights=[w], grad_scale=grad_scale, backend=backend.name)
    assert result.item() == pytest.approx(value**2 / scale * math.sqrt(40), rel=1e-6)


def test_nonfinite_elements_show(backend: KernelBackend, dtype: torch.dtype) -> None:
    lists = tensors(dtype, backend.device)
    lists[-1][-3] = -torch.inf
    assert kernels.norm(lists, backend=backend.name).isposinf()
    lists[2][1] = torch.nan
    assert kernels.norm(lists, backend=backend.name).isnan()


def test_nonfinite_weights_show(backend: KernelBackend, dtype: torch.dtype) -> None:
    lists, weights = tensors(dtype, backend.device), tensors(dtype, backend.device)
    weights[-1][-1] = torch.inf
    assert kernels.norm(lists, weights=weights, backend=backend.name).isposinf()
    lists[-1][-1] = 0
    assert kernels.norm(lists, weights=weights, backend=backend.name).isnan()


def test_empty_tensors_have_norm_zero(backend: KernelBackend, dtype: torch.dtype) -> None:
    empty = [torch.zeros(0, dtype=dtype, device=backend.device) for _ in range(2)]
    assert kernels.norm(empty, backend=backend.name).item() == 0
    assert kernels.norm(empty, weights=empty, backend=backend.name).item() == 0


# numpy, with which triton's interpreter computes, says where the squares overflow.
overflows = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:triton")


@overflows
@weightings
@pytest.mark.parametrize("size", [1e200, 1e160, 1e-160, 1e-200, 5e-324])
def test_squares_beyond_float64(backend: KernelBackend, size: float, weighted: bool) -> None:
    lists = [torch.tensor([3.0, -4.0]), torch.tensor([], dtype=torch.float64), torch.tensor([12.0])]
    lists = [t.double().to(backend.device) * size for t in lists]
    weights = [torch.full_like(t, 2.0) for t in lists] if weighted else None
    output = kernels.norm(lists, weights=weights, backend=backend.name)
    assert output.item() == pytest.approx((26.0 if weighted else 13.0) * size, rel=1e-15, abs=0)


# Powers of two of the elements of three tensors: all beyond, some beyond, on either side or both,
# at the edges of what is summed at once, and such as count though they are not the largest.
EXPONENTS = [
    (600, 600, 600),
    (-600, -600, -600),
    (0, 512, 510),
    (0, -530, -1000),
    (-1074, -1074, -1074),
    (-1060, -538, -540),
    (1015, -1074, 3),
    (-1074, 0, 1015),
    (350, 344, 340),
    (-350, -354, -356),
    (-380, -350, -345),
    (349, 351, 353),
]


@overflows
@weightings
@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_tensors_of_all_sizes_together(
    backend: KernelBackend, exponents: tuple[int, ...], shift: int, weighted: bool
) -> None:
    arena = Arena(torch.float64, 2, (5000, 2049, 7), device=backend.device, shifts=[shift, 0])
    arena.fill(0, 1)
    lists, weights = arena.lists
    for t, w, exponent in zip(lists, weights, exponents, strict=True):
        t.copy_(torch.ldexp(t.sign() + t / 8, torch.tensor(exponent, device=backend.device)))
        w.copy_(w.sign() + w / 8)
    values = torch.cat(lists) * (torch.cat(weights) if weighted else 1)
    output = kernels.norm(lists, weights=weights if weighted else None, backend=backend.name)
    assert 0 < output.item() < math.inf
    assert output.item() == pytest.approx(
        math.hypot(*values.tolist()), rel=NORM[torch.float64], abs=0
    )


@overflows
@pytest.mark.parametrize("size", [1e-156, 1e-157, 1e-158, 1e-162, 1e-170, 1e154, 1e160])
def test_long_sums_of_squares_beyond_float64(backend: KernelBackend, size: float) -> None:
    """Squares have few digits left, or none, and rounding errors could add up."""
    t = size * (1 + torch.rand(100_000, dtype=torch.float64))
    output = kernels.norm([t.to(backend.device)], backend=backend.name)
    assert output.item() == pytest.approx(math.hypot(*t.tolist()), rel=2e-15, abs=0)


@overflows
@pytest.mark.parametrize("exponent", [600, -600, 0])
def test_one_element_of_a_chunk_beyond_float64(backend: KernelBackend, exponent: int) -> None:
    """Beside zeros, and where the whole chunk, part of one and several chunks surround it."""
    for size in (1, 2048, 2049, 7000):
        t = torch.zeros(size, dtype=torch.float64, device=backend.device)
        t[size // 2] = -(2.0**exponent)
        assert kernels.norm([t, t], backend=backend.name).item() == 2**0.5 * 2.0**exponent


@overflows
def test_a_loss_scale_beyond_float32(backend: KernelBackend) -> None:
    t = torch.tensor([3e200, 4e200], dtype=torch.float64, device=backend.device)
    scale = torch.tensor(1e190, dtype=torch.float64, device=backend.device)
    output = kernels.norm([t], grad_scale=scale, backend=backend.name)
    assert output.item() == pytest.approx(5e10, rel=1e-15)


@overflows
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], 0.0),
        ([1e200, math.inf], math.inf),
        ([1e200, math.nan], math.nan),
        ([1e-200, math.inf], math.inf),
        ([1e-200, math.nan], math.nan),
        ([1e200, 3e38], 1e200),
        ([1e-200, 0.0], 1e-200),
        ([1e-200, 1.0], 1.0),
        ([1.5e308, 1.5e308], math.inf),
    ],
)
def test_what_is_no_square_beyond_float64(
    backend: KernelBackend, values: list[float], expected: float
) -> None:
    """Of one float64 tensor, of two, and of one beside a float32 one that holds the rest."""
    both = torch.tensor(values, dtype=torch.float64, device=backend.device)
    lists = [[both], [both[:1], both[1:]]]
    if values[1] != 1.5e308:
        lists += [[both[:1], both[1:].float()], [both[1:].float(), both[:1]]]
    for tensors in lists:
        inputs = {"out": torch.empty((), dtype=torch.float64, device=backend.device)}
        output = kernels.norm(tensors, **inputs, backend=backend.name)
        assert output.item() == pytest.approx(expected, rel=1e-15, abs=0, nan_ok=True)


@overflows
def test_products_of_float64_beyond_it_or_none(backend: KernelBackend) -> None:
    for t, w, expected in (
        (1e200, 1e200, math.inf),
        (1e-200, 1e-200, 0.0),
        (1e300, 1e-300, 1.0),
    ):
        lists, weights = (
            torch.full((1,), v, dtype=torch.float64, device=backend.device) for v in (t, w)
        )
        output = kernels.norm([lists], weights=[weights], backend=backend.name)
        assert output.item() == pytest.approx(expected, rel=1e-15, abs=0)


@overflows
@pytest.mark.parametrize("size", [1e180, 1e-180])
def test_a_float64_gradient_of_float32_weights_beyond_float64(
    backend: KernelBackend, size: float
) -> None:
    weights = [torch.tensor([2.0, 0.5], device=backend.device)]
    lists = [torch.tensor([3 * size, 16 * size], dtype=torch.float64, device=backend.device)]
    output = kernels.norm(lists, weights=weights, backend=backend.name)
    assert output.item() == pytest.approx(10 * size, rel=1e-15, abs=0)
