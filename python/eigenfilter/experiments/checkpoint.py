"""Checkpoints: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import replace

FILE = "checkpoint.pt"
FORMAT = 2


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Put a checkpoint in the place of the one before, in one step, or leave that one.

    Args:
        path: where.
        state: tensors, numbers, strings, lists and dictionaries of them.

    Raises:
        UserError: the disk is full, or cannot be written to. What was there is there still.
    """

    def fill(file: BinaryIO) -> None:
        writer = _Writer(file)
        torch.save({"format": FORMAT} | dict(state), cast(IO[bytes], writer))
        writer.check()

    replace(path, fill)


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of ours; nothing in it is executed.

    Raises:
        UserError: there is none, it is damaged (every byte is checked), or it is something else.
    """
    state = read_tensors(path, device)
    if not isinstance(state, dict) or "format" not in state or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of eigenfilter train")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} is of format {state['format']}, and this version reads {FORMAT}: "
            "train again, or use the version that wrote it"
        )
    return state


def read_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read what torch.save wrote, of tensors and plain data.

    Raises:
        UserError: there is no such file, it is damaged, or it holds other objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the sums
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} holds more than tensors and plain data, or is damaged") from error


class _Writer:
    """Takes everything from torch.save, and says at the end what went wrong.

    An error within would reach the caller as one of torch's own, without its reason.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing yet: `write` of this module flushes."""

    def check(self) -> None:
        if self._error is not None:
            raise self._error
