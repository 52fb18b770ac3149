"""Checked command line arguments, shared by the commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from eigenfilter.experiments.errors import UserError


def positive(text: str) -> float:
    """A finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, got {text!r}"
            )
        return value

    return parse


def output_folder(path: Path) -> Path:
    """The folder, made if need be.

    Raises:
        UserError: if it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
    return path


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
