"""The devices that a user names."""

from __future__ import annotations

import torch

from eigenfilter.experiments.errors import UserError


def device_of(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1"; "auto" is a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name} is not a device: cpu, cuda or cuda:NUMBER") from error
    if device.type == "cuda":
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"torch sees {torch.cuda.device_count()} CUDA devices, not {name}")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UserError(f"{name} is not supported: cpu, cuda or cuda:NUMBER")
    return device
