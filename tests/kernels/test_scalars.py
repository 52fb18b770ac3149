"""Hyperparameters as numbers and as tensors, and the flags a scaler hands over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import ALPHA, DESCENTS, SCALE, Arena, Room, same_bits
from eigenfilter import kernels

SIZES = (5, 64, 1000)
NAMES = ("lr", "momentum", "dampening", "weight_decay")


def descended(room: Room, dtype: torch.dtype, wrap: Callable[[float], Any], **flags: Any) -> Tensor:
    torch.manual_seed(8)
    arena = Arena(dtype, 3, SIZES, room.device)
    arena.fill(0, 1, 2)
    case = next(c for c in DESCENTS if c.momentum == "heavy" and c.decay)
    options = case.options() | {name: wrap(case.options()[name]) for name in NAMES}
    kernels.descend(*arena.lists, **options, **flags, backend=room.backend)
    return torch.cat([arena.values(0), arena.values(2)])


def ascended(room: Room, dtype: torch.dtype, alpha: Any, **flags: Any) -> Tensor:
    torch.manual_seed(9)
    arena = Arena(dtype, 3, SIZES, room.device)
    arena.fill(0, 1)
    kernels.ascend(*arena.lists, alpha, **flags, backend=room.backend)
    return arena.values(0)


def rounded(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_float64_tensors_equal_floats(
    room: Room, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    def wrap(value: float) -> Tensor:
        return torch.full(shape, value, dtype=torch.float64, device=room.device)

    assert same_bits(descended(room, dtype, wrap), descended(room, dtype, float))
    assert same_bits(ascended(room, dtype, wrap(ALPHA)), ascended(room, dtype, ALPHA))


def test_float32_tensors_equal_floats_of_their_value(room: Room, dtype: torch.dtype) -> None:
    def wrap(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=room.device)

    assert same_bits(descended(room, dtype, wrap), descended(room, dtype, rounded))
    assert same_bits(ascended(room, dtype, wrap(ALPHA)), ascended(room, dtype, rounded(ALPHA)))


def test_whole_numbers_are_numbers(room: Room, dtype: torch.dtype) -> None:
    assert same_bits(ascended(room, dtype, 2), ascended(room, dtype, 2.0))


def test_parameters_that_require_grad_are_read_as_scalars(room: Room) -> None:
    learned = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True, device=room.device)
    with torch.no_grad():
        result = ascended(room, torch.float32, learned)
    assert same_bits(result, ascended(room, torch.float32, ALPHA))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_scalars_on_the_host_serve_tensors_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    room = Room(backend, "cuda")
    host = torch.tensor(ALPHA, dtype=torch.float64)
    assert same_bits(ascended(room, dtype, host), ascended(room, dtype, ALPHA))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_a_scale_divides_the_gradient(
    room: Room, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    scale = torch.full(shape, 4.0, device=room.device)
    assert same_bits(
        ascended(room, dtype, ALPHA, grad_scale=scale), ascended(room, dtype, ALPHA / 4)
    )
    scaled = descended(room, dtype, float, grad_scale=scale)
    assert not torch.equal(scaled, descended(room, dtype, float))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_a_flag_of_either_shape_stops_the_update(
    room: Room, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    go, stop = (torch.full(shape, value, device=room.device) for value in (0.0, 1.0))
    moved = ascended(room, dtype, ALPHA, found_inf=go)
    assert same_bits(moved, ascended(room, dtype, ALPHA))
    stopped = ascended(room, dtype, ALPHA, found_inf=stop)
    assert same_bits(stopped, ascended(room, dtype, 0.0))
    assert not torch.equal(stopped, moved)


BAD = {
    "int tensor": torch.tensor(1),
    "bfloat16 tensor": torch.tensor(0.1, dtype=torch.bfloat16),
    "complex tensor": torch.tensor(0.1j),
    "two elements": torch.tensor([0.1, 0.2]),
    "no element": torch.zeros(0),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_a_hyperparameter_of_another_kind_is_named(name: str, bad: str) -> None:
    x, g, m = (torch.ones(4) for _ in range(3))
    options: dict[str, Any] = {"lr": 0.1} | {name: BAD[bad]}
    with pytest.raises(TypeError, match=rf"{name} must be a number or a one-element float32 or"):
        kernels.descend([x], [g], [m], **options)
    assert torch.equal(x, torch.ones(4))
    assert torch.equal(m, torch.ones(4))


@pytest.mark.parametrize("bad", ["0.1", None, [0.1]], ids=repr)
def test_alpha_of_another_type_is_named(bad: object) -> None:
    x, g, b = (torch.ones(4) for _ in range(3))
    with pytest.raises(TypeError, match=r"alpha cannot be used: .* is not a tensor"):
        kernels.ascend([x], [g], [b], bad)
    assert torch.equal(x, torch.ones(4))


@pytest.mark.parametrize(
    "flag",
    [
        torch.zeros((), dtype=torch.float64),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(2),
        torch.zeros(0),
        torch.zeros((), dtype=torch.bool),
        torch.zeros((), device="meta"),
    ],
    ids=str,
)
def test_found_inf_of_another_kind(flag: Tensor) -> None:
    x, g, b = (torch.ones(4) for _ in range(3))
    with pytest.raises((ValueError, TypeError), match="found_inf"):
        kernels.ascend([x], [g], [b], 0.1, found_inf=flag)
    with pytest.raises((ValueError, TypeError), match="found_inf"):
        kernels.flag_nonfinite([x], flag)
    assert torch.equal(x, torch.ones(4))


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros((), dtype=torch.float64),
        torch.zeros(2),
        torch.zeros((), dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_out_of_another_kind(out: Tensor) -> None:
    with pytest.raises(ValueError, match="out must be a dense float32 tensor of 1 elements on cpu"):
        kernels.norm([torch.ones(3)], out=out)
    assert (out == 0).all()


def test_scale_is_not_one_by_accident(room: Room) -> None:
    scale = torch.tensor(SCALE, device=room.device)
    t = torch.ones(16, device=room.device)
    norm = kernels.norm([t], grad_scale=scale, backend=room.backend)
    assert norm.item() == pytest.approx(4 / SCALE, rel=1e-6)
