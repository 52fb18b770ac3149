"""Backend selection: the one place that decides which implementation serves a device."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels import native
from eigenfilter.kernels.conventions import Scalar

BACKENDS = ("native", "triton", "reference")

_logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The kernels of a backend, with the arguments of `eigenfilter.kernels`."""

    def perturb(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        backups: Sequence[Tensor],
        alpha: Scalar,
        *,
        adaptive: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Save and perturb; see `eigenfilter.kernels.perturb`."""

    def perturb_again(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        alpha: Scalar,
        backups: Sequence[Tensor] | None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Perturb once more; see `eigenfilter.kernels.perturb_again`."""

    def perturb_hvp(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        base_grads: Sequence[Tensor],
        backups: Sequence[Tensor],
        alpha: Scalar,
        eps: Scalar,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Perturb along a Hessian-vector product; see `eigenfilter.kernels.perturb_hvp`."""

    def sgd_step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor] | None,
        backups: Sequence[Tensor] | None,
        *,
        lr: Scalar,
        momentum: Scalar = 0.0,
        dampening: Scalar = 0.0,
        weight_decay: Scalar = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        rounding_seed: Scalar | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Restore and step; see `eigenfilter.kernels.sgd_step`."""

    def adamw_step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        backups: Sequence[Tensor] | None,
        *,
        lr: Scalar,
        beta1: Scalar,
        beta2: Scalar,
        eps: Scalar,
        weight_decay: Scalar,
        step: Scalar,
        maximize: bool = False,
        rounding_seed: Scalar | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Restore and take AdamW's step; see `eigenfilter.kernels.adamw_step`."""

    def norm(
        self,
        tensors: Sequence[Tensor],
        out: Tensor,
        *,
        weights: Sequence[Tensor] | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Euclidean norm; see `eigenfilter.kernels.norm`."""

    def orthogonalize(
        self, w: Tensor, basis: Tensor, coefficients: Tensor, norms: Tensor, *, passes: int
    ) -> None:
        """Orthogonalize against a basis; see `eigenfilter.kernels.orthogonalize`."""

    def row_dots(self, q: Tensor, w: Tensor, sums: Tensor) -> None:
        """Inner products; see `eigenfilter.kernels.row_dots`."""

    def lanczos_step(self, u: Tensor, q: Tensor, w: Tensor, factors: Tensor, sums: Tensor) -> None:
        """A step of recurrences; see `eigenfilter.kernels.lanczos_step`."""

    def gram(self, vectors: Tensor, out: Tensor) -> None:
        """Inner products of all pairs; see `eigenfilter.kernels.gram`."""

    def mix_rows(self, vectors: Tensor, factors: Tensor) -> None:
        """Triangular combinations; see `eigenfilter.kernels.mix_rows`."""

    def flag_nonfinite(self, tensors: Sequence[Tensor], found_inf: Tensor) -> None:
        """Flag inf and NaN; see `eigenfilter.kernels.flag_nonfinite`."""


def select(device: torch.device | str, backend: str | None = None) -> Backend:
    """Return the implementation for a device.

    Args:
        device: device of type "cpu" or "cuda" (torch's name for ROCm too). "cuda" without a number
            stands for the current GPU.
        backend: name of a backend, which works or raises. None selects native on the CPU, and on a
            GPU native if its kernels were compiled for such a GPU, else Triton. The selection is
            logged once.

    Raises:
        ValueError: the backend is unknown, or no backend serves the device.
        RuntimeError: the backend is not available, or not for this device.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _select(device, backend)


@functools.cache
def _select(device: torch.device, backend: str | None) -> Backend:
    """Choose once for each device, because the devices of a machine may differ."""
    if backend is None:
        return _select(device, _automatic(device))
    if backend == "reference":
        from eigenfilter.kernels import reference

        return cast(Backend, reference)
    if backend == "native":
        if device.type == "cuda":
            _require_native(device)
        elif device.type != "cpu":
            raise ValueError(_unserved(device.type))
        return cast(Backend, native)
    if backend == "triton":
        triton_kernels = _triton()
        triton_kernels.require(device.type)
        return cast(Backend, triton_kernels)
    raise ValueError(_unknown(backend))


def of(name: str, tensors: Sequence[Tensor], backend: str | None) -> Backend:
    """Return the implementation that serves the device of `tensors`, which messages call `name`.

    Raises:
        TypeError, ValueError: as `first`; ValueError also for an unknown backend.
    """
    if backend is not None and not isinstance(backend, str):
        raise ValueError(_unknown(backend))
    return _select(first(name, tensors).device, backend)


def first(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return the first of some tensors.

    Raises:
        TypeError: `tensors` is not a list of tensors.
        ValueError: the list is empty.
    """
    if isinstance(tensors, Tensor):
        raise TypeError("the kernels take lists of tensors: pass [tensor]")
    if not isinstance(tensors, (list, tuple, _core.TensorList)):
        raise TypeError(f"{name} must be a list or tuple of tensors")
    try:
        tensor = tensors[0]
    except IndexError:  # it was empty, or another thread has emptied it
        raise ValueError("no tensors: pass at least one") from None
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise TypeError(f"{name}[0] cannot be used: {kind} is not a tensor of torch")
    return tensor


def _unknown(backend: object) -> str:
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


def _triton() -> ModuleType:
    try:
        from eigenfilter.kernels import triton_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            'backend "triton" needs the triton package: pip install triton'
        ) from error
    return triton_kernels
