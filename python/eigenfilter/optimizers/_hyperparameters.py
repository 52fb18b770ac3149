"""What the groups' hyperparameters may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The parameters' dtypes."""

_NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "eps", "rho")


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Raise ValueError, with the range, for a hyperparameter that is out of it.

    Tensors are not read: that would wait for their device.
    """
    for name in _NOT_NEGATIVE:
        value = group.get(name, 0.0)
        if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, and is {value}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be a number or a one-element tensor")
    for beta in group.get("betas", ()):
        if not isinstance(beta, Tensor) and not 0 <= beta < 1:
            raise ValueError(f"betas must be at least 0 and below 1, and one is {beta}")
    if group.get("nesterov") and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening 0")


def check_scalars(group: dict[str, Any], device: torch.device) -> None:
    """Raise TypeError or ValueError for a hyperparameter that kernels on `device` cannot take.

    Kernels say so themselves; asked before the first of several, nothing is half done.
    """
    named = [(name, group.get(name)) for name in (*_NOT_NEGATIVE, "dampening")]
    named += [("betas", beta) for beta in group.get("betas", ())]
    for name, value in named:
        if not isinstance(value, Tensor):
            continue
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be a number or a one-element float32 or float64 tensor")
        if value.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"{name} is on {value.device} and its parameters are on {device}: move it there or "
                "to the CPU"
            )


def is_zero(value: float | Tensor) -> bool:
    """Whether a number is 0; a tensor never counts as 0."""
    return not isinstance(value, Tensor) and value == 0


def lr_is_zero(lr: float | Tensor) -> bool:
    """Whether lr is 0; a tensor on a device counts as not 0, because to look would wait for it."""
    return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) == 0
