"""Fixtures for every backend of the kernels that this build has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import backends
from cases import KernelBackend
from eigenfilter import _core

CPU_BACKENDS = [KernelBackend("native", isa=isa) for isa in _core.isas()]
GPU_BACKENDS = [KernelBackend("triton", "cuda"), KernelBackend("reference", "cuda")]
if _core.cuda_compiled:
    GPU_BACKENDS.append(KernelBackend("native", "cuda"))


def backend_params(*, reference: bool) -> list[object]:
    """The backends as parameters; without the reference where others are compared to it."""
    choice = [*CPU_BACKENDS, KernelBackend("reference"), *GPU_BACKENDS]
    if backends.EMULATED:
        choice = [KernelBackend("native")]
    elif backends.INTERPRETED:
        choice = [KernelBackend("triton")]
    return [
        pytest.param(backend, id=str(backend), marks=_marks(backend))
        for backend in choice
        if reference or backend.name != "reference"
    ]


def _marks(backend: KernelBackend) -> list[pytest.MarkDecorator]:
    """The instruction sets that this machine does not choose are for `make test-all`."""
    marks = [pytest.mark.gpu] if backend.device == "cuda" else []
    return [*marks, pytest.mark.slow] if backend.isa not in ("", _core.isa()) else marks


@pytest.fixture(autouse=True)
def poisoned_memory(poisoned: None) -> None:
    pass


@pytest.fixture(autouse=True)
def best_isa() -> Iterator[None]:
    """Tests leave the instruction set as it was."""
    before = _core.isa()
    yield
    _core.set_isa(before)


def _enter(backend: KernelBackend) -> KernelBackend:
    if backend.isa:
        _core.set_isa(backend.isa)
    return backend


@pytest.fixture(params=["triton"] if backends.INTERPRETED else ["native", "reference"])
def host_backend(request: pytest.FixtureRequest) -> str:
    """A backend that takes tensors of the CPU."""
    return str(request.param)


@pytest.fixture(params=backend_params(reference=True))
def backend(request: pytest.FixtureRequest) -> KernelBackend:
    return _enter(request.param)


@pytest.fixture(params=backend_params(reference=False))
def fast_backend(request: pytest.FixtureRequest) -> KernelBackend:
    """A backend that has to agree with the reference."""
    return _enter(request.param)
