"""Checkpoints: written whole or not at all, and checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from eigenfilter.experiments import archives
from eigenfilter.experiments import config as configs
from eigenfilter.experiments.errors import UserError, quoted
from eigenfilter.experiments.files import replace
from eigenfilter.experiments.schema import validate

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
        writer = _ErrorCapturingWriter(file)
        torch.save({"format": FORMAT} | dict(state), cast(IO[bytes], writer))
        writer.check()

    replace(path, fill)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours; nothing in it is executed.

    Raises:
        UserError: there is none, it is damaged (every byte is checked), or it is something else.
    """
    state = archives.read(path)
    if not isinstance(state, dict) or "format" not in state or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of eigenfilter train")
    if type(state["format"]) is not int:
        raise UserError(f"{path} is not a checkpoint of eigenfilter train")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} is of format {quoted(state['format'])}, and this version reads {FORMAT}: "
            "train again, or use the version that wrote it"
        )
    return state


def read_run(path: Path) -> dict[str, Any]:
    """Read the checkpoint of a run, and check that it has the entries of one.

    What is in `trainer`, `history` and `last` is checked by `saved`, beside the run's own.

    Raises:
        UserError: as `read`; an entry is missing, or of another type.
    """
    state = read(path)
    try:
        validate(state, _ENTRIES, "it")
        configs.check_plain(state["config"])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): train again, or restore it") from error
    return state


_ENTRIES = {
    "format": FORMAT,
    "config": dict,
    "data": int,
    "trainer": dict,
    "history": list,
    "last": dict,
    "seconds": float,
    "versions": dict,
    "log": int,
}


class _ErrorCapturingWriter:
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
        # torch keeps this writer; with the error it would keep its frames, and all that they hold.
        error, self._error = self._error, None
        if error is not None:
            raise error
