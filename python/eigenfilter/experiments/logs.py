"""What a run leaves behind while it goes: lines of JSON, and TensorBoard's events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eigenfilter.experiments.errors import UserError, require

FILE = "log.jsonl"
EVENTS = "tensorboard"


def check(folder: Path, size: int, records: int) -> None:
    """Check that the log of a run is that of its checkpoint, which has its size and records.

    Raises:
        UserError: it is shorter, or damaged.
    """
    path = folder / FILE
    if not size and not records:
        return
    try:
        with path.open("rb") as file:
            # A size beyond the file's may be one that there is no memory for.
            found = file.read(size) if size <= os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(found) < size or found.count(b"\n") != records or not found.endswith(b"\n"):
        raise UserError(
            f"{path} is not the log of the checkpoint beside it: restore it, or train again into "
            "another --out"
        )


class RunLog:
    """Records of a run, in `log.jsonl` and, if wanted, in `tensorboard/`.

    Args:
        folder: the run's.
        size: of the file at the step gone on from: what is behind it belongs to steps that are
            taken anew, and is cut off. 0 for a new run.
        step: the step gone on from.
        tensorboard: whether to write events; needs the package.

    Raises:
        UserError: a file cannot be written, or the package is missing.
    """

    def __init__(
        self, folder: Path, *, size: int = 0, step: int = 0, tensorboard: bool = False
    ) -> None:
        self._path = folder / FILE
        try:
            self._file = self._path.open("ab")
            if self._file.tell() > size:
                self._file.truncate(size)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        self._writer: Any = None
        if tensorboard:
            require("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(folder / EVENTS), purge_step=step + 1 if step else None
            )

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Add a record of some kind: "train", "test", "sharpness".

        Raises:
            UserError: the disk is full.
        """
        record = {"kind": kind, "step": step} | json_safe(values)
        with _writing(self._path):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        if self._writer is None:
            return
        with _writing(self._path.parent / EVENTS):
            for name, value in json_safe(values).items():
                if value is not None:
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> int:
        """The file's size, once all of it has reached the disk.

        Raises:
            UserError: the disk is full, or cannot be written to.
        """
        with _writing(self._path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the files.

        Raises:
            UserError: TensorBoard's events, which are written later, found the disk full.
        """
        with suppress(OSError):  # `write` has said so
            self._file.close()
        if self._writer is not None:
            with _writing(self._path.parent / EVENTS):
                self._writer.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def json_safe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with None for NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
