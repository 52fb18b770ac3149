"""Checkpoints: they are written atomically, and every byte is checked when they are read."""

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
    """Replace a checkpoint atomically.

    Args:
        path: path of the checkpoint.
        state: tensors, numbers, strings, and lists and dictionaries of these.

    Raises:
        UserError: the disk is full or cannot be written to. The old checkpoint is unchanged.
    """

    def fill(file: BinaryIO) -> None:
        writer = _ErrorCapturingWriter(file)
        torch.save({"format": FORMAT} | dict(state), cast(IO[bytes], writer))
        writer.check()

    replace(path, fill)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of eigenfilter without executing anything from it.

    Raises:
        UserError: the file does not exist, is damaged, or is not a checkpoint.
    """
    state = archives.read(path)
    if not isinstance(state, dict) or "format" not in state or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of eigenfilter train")
    if type(state["format"]) is not int:
        raise UserError(f"{path} is not a checkpoint of eigenfilter train")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has format {quoted(state['format'])}, and this version reads {FORMAT}; "
            "train again, or use the version that wrote it"
        )
    return state


def read_run(path: Path) -> dict[str, Any]:
    """Read the checkpoint of a run, and check the types of its entries.

    The module `validation` checks the contents of `trainer`, `history` and `last`.

    Raises:
        UserError: see `read`; or an entry is missing or has another type.
    """
    state = read(path)
    try:
        validate(state, _ENTRIES, "it")
        configs.check_plain(state["config"])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train again, or restore it") from error
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
    """A file for torch.save that stores an OSError instead of raising it.

    torch.save would replace an error during a write by one of its own, without the reason.
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
        """Do nothing, because `files.replace` flushes the file."""

    def check(self) -> None:
        # torch keeps a reference to this object. Without the error it does not also keep the
        # frames of the traceback and all their values alive.
        error, self._error = self._error, None
        if error is not None:
            raise error
