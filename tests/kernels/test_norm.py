"""norm against exact sums, and the same to the bit whatever runs it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cases import SCALE, Arena, Room
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
def test_norm(room: Room, dtype: torch.dtype, scale: float | None, weighted: bool) -> None:
    lists = tensors(dtype, room.device)
    weights = tensors(dtype, room.device, 1) if weighted else None
    grad_scale = None if scale is None else torch.tensor([scale], device=room.device)
    result = kernels.norm(lists, weights=weights, grad_scale=grad_scale, backend=room.backend)
    exact = exact_norm(lists, weights)
    if grad_scale is not None:
        exact /= grad_scale.item()
    assert result.shape == ()
    assert result.device == lists[0].device
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.item() == pytest.approx(exact, rel=NORM[dtype], abs=0)


def test_out_is_filled_and_returned(room: Room, dtype: torch.dtype) -> None:
    lists = tensors(dtype, room.device)
    expected = kernels.norm(lists, backend=room.backend)
    out = torch.full_like(expected, torch.nan)
    assert kernels.norm(lists, out=out, backend=room.backend) is out
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
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_same_bits_from_run_to_run_on_a_gpu(
    dtype: torch.dtype, backend: str, weighted: bool
) -> None:
    if backend == "native" and not _core.cuda_compiled:
        pytest.skip("built without CUDA kernels")
    lists = tensors(dtype, "cuda")
    weights = tensors(dtype, "cuda") if weighted else None
    results = {kernels.norm(lists, weights=weights, backend=backend).item() for _ in range(20)}
    assert len(results) == 1


@weightings
def test_alignment_does_not_change_the_sum(
    fast_room: Room, dtype: torch.dtype, weighted: bool
) -> None:
    """In float64, whatever the dtype: a narrower result would hide another order."""
    for _ in range(3):
        aligned = [t.clone() for t in tensors(dtype, fast_room.device)]
        factors = [t.clone() for t in tensors(dtype, fast_room.device)]
        lists, weights = (tensors(dtype, fast_room.device, 1) for _ in range(2))
        torch._foreach_copy_(lists, aligned)
        torch._foreach_copy_(weights, factors)
        results = set()
        for given, by in ((aligned, factors), (lists, weights)):
            out = torch.empty((), dtype=torch.float64, device=fast_room.device)
            options = {"weights": by if weighted else None, "backend": fast_room.backend}
            results.add(kernels.norm(given, out=out, **options).item())
        assert len(results) == 1


def test_more_chunks_than_are_added_at_once(
    fast_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's last program takes as many as its block has; a smaller block stands for many."""
    if fast_room.backend == "triton":
        from eigenfilter.kernels import triton_device

        monkeypatch.setattr(triton_device, "NORM_BLOCK", 4)
    t = torch.randn(9 * 4096, device=fast_room.device)
    result = kernels.norm([t], backend=fast_room.backend)
    assert result.item() == pytest.approx(exact_norm([t], None), rel=NORM[torch.float32])


def test_weights_of_one_are_none(room: Room, dtype: torch.dtype) -> None:
    lists = tensors(dtype, room.device)
    ones = [torch.ones_like(t) for t in lists]
    for scale in (None, torch.tensor(SCALE, device=room.device)):
        plain, weighted = (
            kernels.norm(lists, weights=weights, grad_scale=scale, backend=room.backend)
            for weights in (None, ones)
        )
        assert torch.equal(weighted, plain)


def test_weights_may_be_the_tensors(room: Room, dtype: torch.dtype) -> None:
    lists = tensors(dtype, room.device)
    result = kernels.norm(lists, weights=lists, backend=room.backend)
    assert result.item() == pytest.approx(exact_norm(lists, lists), rel=NORM[dtype], abs=0)


def test_squares_beyond_the_range_of_float32(fast_room: Room) -> None:
    for value in (1e30, 1e-30):
        t = torch.full((40,), value, device=fast_room.device)
        result = kernels.norm([t], backend=fast_room.backend)
        assert result.item() == pytest.approx(value * math.sqrt(40), rel=1e-6)


@pytest.mark.parametrize(("value", "scale"), [(1e30, 1e35), (1e-30, 1e-35)])
def test_products_with_weights_beyond_the_range_of_float32(
    room: Room, value: float, scale: float
) -> None:
    t, w = (torch.full((40,), value, device=room.device) for _ in range(2))
    grad_scale = torch.tensor(scale, device=room.device)
    result = kernels.norm([t], weights=[w], grad_scale=grad_scale, backend=room.backend)
    assert result.item() == pytest.approx(value**2 / scale * math.sqrt(40), rel=1e-6)


def test_nonfinite_elements_show(room: Room, dtype: torch.dtype) -> None:
    lists = tensors(dtype, room.device)
    lists[-1][-3] = -torch.inf
    assert kernels.norm(lists, backend=room.backend).isposinf()
    lists[2][1] = torch.nan
    assert kernels.norm(lists, backend=room.backend).isnan()


def test_nonfinite_weights_show(room: Room, dtype: torch.dtype) -> None:
    lists, weights = tensors(dtype, room.device), tensors(dtype, room.device)
    weights[-1][-1] = torch.inf
    assert kernels.norm(lists, weights=weights, backend=room.backend).isposinf()
    lists[-1][-1] = 0
    assert kernels.norm(lists, weights=weights, backend=room.backend).isnan()


def test_empty_tensors_have_norm_zero(room: Room, dtype: torch.dtype) -> None:
    empty = [torch.zeros(0, dtype=dtype, device=room.device) for _ in range(2)]
    assert kernels.norm(empty, backend=room.backend).item() == 0
    assert kernels.norm(empty, weights=empty, backend=room.backend).item() == 0


@weightings
@pytest.mark.parametrize("size", [1e200, 1e160, 1e-160, 1e-200, 5e-324])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_squares_beyond_float64(backend: str, size: float, weighted: bool) -> None:
    lists = [torch.tensor([3.0, -4.0]), torch.tensor([], dtype=torch.float64), torch.tensor([12.0])]
    lists = [t.double() * size for t in lists]
    weights = [torch.full_like(t, 2.0) for t in lists] if weighted else None
    found = kernels.norm(lists, weights=weights, backend=backend)
    assert found.item() == pytest.approx((26.0 if weighted else 13.0) * size, rel=1e-15)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], 0.0),
        ([1e200, math.inf], math.inf),
        ([1e200, math.nan], math.nan),
        ([1e200, 3e38], 1e200),
        ([1.5e308, 1.5e308], math.inf),
    ],
)
def test_what_is_no_square_beyond_float64(
    backend: str, values: list[float], expected: float
) -> None:
    lists = [torch.tensor(values[:1], dtype=torch.float64), torch.tensor(values[1:])]
    lists = lists if values[1] <= 3e38 else [torch.tensor(values, dtype=torch.float64)]
    found = kernels.norm(lists, backend=backend)
    assert found.item() == pytest.approx(expected, rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_float64_gradient_of_float32_weights_beyond_float64(backend: str) -> None:
    weights = [torch.tensor([2.0, 0.5])]
    lists = [torch.tensor([3e180, 16e180], dtype=torch.float64)]
    found = kernels.norm(lists, weights=weights, backend=backend)
    assert found.item() == pytest.approx(1e181, rel=1e-15)
