"""Rooms: every implementation of the kernels that this build has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import backends
from cases import Room
from eigenfilter import _core

CPU_ROOMS = [Room("native", isa=isa) for isa in _core.isas()]
GPU_ROOMS = [Room("triton", "cuda"), Room("reference", "cuda")]
if _core.cuda_compiled:
    GPU_ROOMS.append(Room("native", "cuda"))


def rooms(*, reference: bool) -> list[object]:
    """The rooms as parameters; without the reference where others are compared to it."""
    chosen = [*CPU_ROOMS, Room("reference"), *GPU_ROOMS]
    if backends.EMULATED:
        chosen = [Room("native")]
    elif backends.INTERPRETED:
        chosen = [Room("triton")]
    return [
        pytest.param(room, id=str(room), marks=[pytest.mark.gpu] * (room.device == "cuda"))
        for room in chosen
        if reference or room.backend != "reference"
    ]


@pytest.fixture(autouse=True)
def poisoned_memory(poisoned: None) -> None:
    pass


@pytest.fixture(autouse=True)
def best_isa() -> Iterator[None]:
    """Tests leave the instruction set as it was."""
    before = _core.isa()
    yield
    _core.set_isa(before)


def _enter(room: Room) -> Room:
    if room.isa:
        _core.set_isa(room.isa)
    return room


@pytest.fixture(params=["triton"] if backends.INTERPRETED else ["native", "reference"])
def host_backend(request: pytest.FixtureRequest) -> str:
    """A backend that takes tensors of the CPU."""
    return str(request.param)


@pytest.fixture(params=rooms(reference=True))
def room(request: pytest.FixtureRequest) -> Room:
    return _enter(request.param)


@pytest.fixture(params=rooms(reference=False))
def fast_room(request: pytest.FixtureRequest) -> Room:
    """A room that has to agree with the reference."""
    return _enter(request.param)
