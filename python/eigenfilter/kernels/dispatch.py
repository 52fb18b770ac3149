"""Backend selection: the one place that decides which implementation serves a device."""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter import _core

BACKENDS = ("native", "triton", "reference")

_ANY_GPU = torch.device("cuda")  # to compare with it is faster than to ask a device for its type
_logger = logging.getLogger(__name__)


def choose(device: torch.device, backend: str | None = None) -> str:
    """Return the name of the backend that serves a device: see `eigenfilter.kernels.select`.

    Raises:
        ValueError: the backend is unknown, or no backend serves the device.
        RuntimeError: the backend is not available, or not for this device.
    """
    if backend is not None and not isinstance(backend, str):
        raise ValueError(unknown(backend))
    if device == _ANY_GPU and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _choose(device, backend)


@functools.cache
def _choose(device: torch.device, backend: str | None) -> str:
    """Choose once for each device, because the devices of a machine may differ."""
    if device.type == "meta":
        raise ValueError(
            "tensors on the meta device have no data: move the model with .to_empty(device=...) "
            "to cpu or cuda, and initialize it"
        )
    if backend is None:
        return _choose(device, _automatic(device))
    if backend not in BACKENDS:
        raise ValueError(unknown(backend))
    if backend == "native":
        if device.type == "cuda":
            _require_native(device)
        elif device.type != "cpu":
            raise ValueError(_unserved(device.type))
    elif backend == "triton":
        _require_triton(device)
    return backend


def first(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return the first of some tensors.

    Raises:
        TypeError: `tensors` is not a list of tensors.
        ValueError: the list is empty.
    """
    if not isinstance(tensors, (list, tuple, _core.TensorList)):
        if isinstance(tensors, Tensor):
            raise TypeError("the kernels take lists of tensors: pass [tensor]")
        raise TypeError(f"{name} must be a list or tuple of tensors")
    try:
        item = tensors[0]
    except IndexError:  # it was empty, or another thread has emptied it
        raise ValueError("no tensors: pass at least one") from None
    if not isinstance(item, Tensor):
        kind = type(item).__name__
        raise TypeError(f"{name}[0] cannot be used: {kind} is not a tensor of torch")
    return item


def tensor(name: str, value: Tensor) -> Tensor:
    """Return an argument that must be a tensor, or raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    return value


def unknown(backend: object) -> str:
    """Return the message for a backend that there is not."""
    return f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}, or None"


def _automatic(device: torch.device) -> str:
    """Choose a backend for a device, and log the choice."""
    reason = None
    if device.type == "cpu":
        choice = "native"
    elif device.type == "cuda":
        has_kernels = _core.cuda_compiled and torch.version.cuda is not None
        reason = missing_code(device) if has_kernels else None
        choice = "native" if has_kernels and reason is None else "triton"
    else:
        raise ValueError(_unserved(device.type))
    _logger.info("kernels on %s: %s%s", device, choice, "" if reason is None else f" ({reason})")
    return choice


def missing_code(device: torch.device) -> str | None:
    """Return why a GPU cannot run the compiled CUDA kernels; None if it can, or torch sees none."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if any(_runs(architecture, capability) for architecture in _core.cuda_architectures):
        return None
    return (
        f"it has compute capability {'.'.join(map(str, capability))}, and the CUDA kernels were "
        f"compiled for {', '.join(_core.cuda_architectures)}"
    )


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, in CMake's notation, runs on a GPU of a compute capability.

    Machine code ("90-real") runs where the major number is the same and the minor no less, PTX
    ("90-virtual"; "90" is both) wherever the capability is no less. Code for the features of one
    chip ("90a") runs on that chip alone, and "100f" on its family, which shares the major number.
    """
    parts = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", architecture)
    if parts is None:
        raise RuntimeError(f"the build names an unknown CUDA architecture, {architecture!r}")
    compiled = int(parts[1]), int(parts[2])
    if parts[3] == "a":
        return compiled == capability
    is_bound = parts[3] == "f" or parts[4] == "real"
    return compiled <= capability and (compiled[0] == capability[0] or not is_bound)


def _require_native(device: torch.device) -> None:
    """Raise RuntimeError unless the CUDA kernels were compiled, and for this GPU."""
    _core.require_cuda()
    reason = missing_code(device)
    if reason is not None:
        raise RuntimeError(
            f'backend "native" has no code for {device}: {reason}. Use backend="triton", or '
            "install eigenfilter from source with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native"
        )


def _unserved(device_type: str) -> str:
    return (
        f"no kernels for device {device_type!r}: move the tensors to cpu or cuda, "
        'or ask for backend="reference"'
    )


def _require_triton(device: torch.device) -> None:
    """Raise RuntimeError unless Triton is installed, and runs on this type of device."""
    try:
        launch = importlib.import_module("eigenfilter.kernels.triton.launch")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            'backend "triton" needs the triton package: pip install triton'
        ) from error
    launch.require(device.type)
