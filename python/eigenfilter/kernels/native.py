"""The compiled room: C++ on the CPU, CUDA C++ on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels.reference import Scalar


def ascend(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Save and move; see `eigenfilter.kernels.ascend`."""
    _core.ascend(params, grads, backups, alpha, grad_scale, found_inf, torch.get_num_threads())


def descend(
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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Restore and step; see `eigenfilter.kernels.descend`."""
    _core.descend(
        params,
        grads,
        momenta,
        backups,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        grad_scale,
        found_inf,
        torch.get_num_threads(),
    )


def norm(tensors: Sequence[Tensor], out: Tensor, *, grad_scale: Tensor | None = None) -> None:
    """Euclidean norm; see `eigenfilter.kernels.norm`."""
    workspace = None
    if out.device.type != "cpu":
        size = _core.norm_workspace(tensors)
        workspace = torch.empty(size, dtype=torch.float64, device=out.device)
    _core.norm(tensors, out, grad_scale, workspace, torch.get_num_threads())


def flag_nonfinite(tensors: Sequence[Tensor], found_inf: Tensor) -> None:
    """Flag inf and NaN; see `eigenfilter.kernels.flag_nonfinite`."""
    _core.flag_nonfinite(tensors, found_inf, torch.get_num_threads())
