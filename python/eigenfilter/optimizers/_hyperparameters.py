"""The ranges of the groups' hyperparameters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The parameters' dtypes."""

OWN_RHO = "ascent_rho"
"""Key of the ascent's radius in groups whose base optimizer has a `rho` of its own."""

_NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "eps", "rho", OWN_RHO)
CHECKED = (*_NOT_NEGATIVE, "dampening", "betas", "nesterov", "amsgrad", "differentiable")
"""The hyperparameters that are checked in every group."""


def rho_key(group: Mapping[str, Any]) -> str:
    """The key of the ascent's radius in a group."""
    return OWN_RHO if OWN_RHO in group else "rho"


def rho_of(group: Mapping[str, Any]) -> float | Tensor:
    """The radius of a group's ascent; 0 where it has none."""
    rho: float | Tensor = group.get(rho_key(group), 0.0)
    return rho


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Check the hyperparameters of a group, except tensors on a GPU, which a check would wait for.

    Raises:
        TypeError: one is neither a number nor a float32 or float64 tensor.
        ValueError: one is out of its range, or a tensor of more than one element.
    """
    for name in _NOT_NEGATIVE:
        if name in group:
            value = _number(name, group[name])
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, and is {value}")
    if "dampening" in group:
        value = _number("dampening", group["dampening"])
        if value is not None and not math.isfinite(value):
            raise ValueError(f"dampening must be finite, and is {value}")
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, and is {betas!r}")
        for beta in betas:
            value = _number("betas", beta)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"betas must be at least 0 and below 1, and one is {value}")
    if group.get("nesterov") and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening 0")


def _number(name: str, value: Any) -> float | None:
    """The value of a hyperparameter, or None if reading it would wait for a device."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a one-element tensor")
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} must be a number or a one-element float32 or float64 tensor, and is a "
                f"tensor of {value.dtype}"
            )
        return value.item() if value.device.type == "cpu" else None
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a one-element tensor, and is {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, and is beyond every float") from None


def check_scalars(group: dict[str, Any], device: torch.device) -> None:
    """Raise TypeError or ValueError for a hyperparameter that kernels on `device` cannot take.

    The kernels check this too. Checking before the first of several calls keeps a step atomic.
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
    """Whether lr is 0; a tensor on a device counts as not 0, because reading it would wait."""
    return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) == 0
