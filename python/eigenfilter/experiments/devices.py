"""Devices by the name that a user gives."""

from __future__ import annotations

import torch

from eigenfilter.experiments.errors import UserError


def device_of(name: str) -> torch.device:
    """Return a device by name: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.

    Raises:
        UserError: the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name} is not a device; give cpu, cuda or cuda:NUMBER") from error
    if device.type == "cuda":
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"torch sees {torch.cuda.device_count()} CUDA devices, not {name}")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UserError(f"{name} is not supported; give cpu, cuda or cuda:NUMBER")
    return device
