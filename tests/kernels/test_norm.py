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


def exact_norm(lists: list[Tensor]) -> float:
    return math.sqrt(math.fsum(v * v for t in lists for v in t.double().tolist()))


@pytest.mark.parametrize("scale", [None, SCALE])
def test_norm(room: Room, dtype: torch.dtype, scale: float | None) -> None:
    lists = tensors(dtype, room.device)
    grad_scale = None if scale is None else torch.tensor([scale], device=room.device)
    result = kernels.norm(lists, grad_scale=grad_scale, backend=room.backend)
    exact = exact_norm(lists)
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


@pytest.mark.usefixtures("threads")
def test_the_same_bits_from_every_instruction_set_alignment_and_number_of_threads(
    dtype: torch.dtype,
) -> None:
    results = set()
    values = tensors(dtype)
    for shift in (0, 1, 7):
        lists = tensors(dtype, shift=shift)
        for t, v in zip(lists, values, strict=True):
            t.copy_(v)
        for isa in _core.isas():
            _core.set_isa(isa)
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                results.add(kernels.norm(lists, backend="native").item())
    assert len(results) == 1
    assert results.pop() > 100


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_same_bits_from_run_to_run_on_a_gpu(dtype: torch.dtype, backend: str) -> None:
    if backend == "native" and not _core.cuda_compiled:
        pytest.skip("built without CUDA kernels")
    lists = tensors(dtype, "cuda")
    assert len({kernels.norm(lists, backend=backend).item() for _ in range(20)}) == 1


def test_squares_beyond_the_range_of_float32(fast_room: Room) -> None:
    for value in (1e30, 1e-30):
        t = torch.full((40,), value, device=fast_room.device)
        result = kernels.norm([t], backend=fast_room.backend)
        assert result.item() == pytest.approx(value * math.sqrt(40), rel=1e-6)


def test_nonfinite_elements_show(room: Room, dtype: torch.dtype) -> None:
    lists = tensors(dtype, room.device)
    lists[-1][777] = -torch.inf
    assert kernels.norm(lists, backend=room.backend).isposinf()
    lists[2][1] = torch.nan
    assert kernels.norm(lists, backend=room.backend).isnan()


def test_empty_tensors_have_norm_zero(room: Room, dtype: torch.dtype) -> None:
    empty = [torch.zeros(0, dtype=dtype, device=room.device) for _ in range(2)]
    assert kernels.norm(empty, backend=room.backend).item() == 0
