"""The log of a run: lines of JSON, and TensorBoard events."""

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
    """Check that the log of a run belongs to its checkpoint.

    Args:
        folder: folder of the run.
        size: size of the log when the checkpoint was written.
        records: number of records that the log had then.

    Raises:
        UserError: the log is shorter, or damaged.
    """
    path = folder / FILE
    if not size and not records:
        return
    try:
        with path.open("rb") as file:
            # A damaged checkpoint may claim a size for which there is not enough memory.
            content = file.read(size) if size <= os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(content) < size or content.count(b"\n") != records or not content.endswith(b"\n"):
        raise UserError(
            f"{path} is not the log of the checkpoint beside it; restore it, or train again into "
            "another --out"
        )


class RunLog:
    """Records of a run in `log.jsonl` and, on request, in `tensorboard/`.

    Args:
        folder: folder of the run.
        size: size of the file at the step that training resumes from, 0 for a new run. Later
            records are removed, because their steps are taken again.
        step: step that training resumes from.
        tensorboard: whether to write events, which needs the tensorboard package.

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
        """Add a record of a kind: "train", "test" or "sharpness".

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
        """Synchronize the file to the disk, and return its size.

        Raises:
            UserError: the disk is full or cannot be written to.
        """
        with _writing(self._path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the files.

        Raises:
            UserError: the disk is full for the events, which TensorBoard writes with a delay.
        """
        with suppress(OSError):  # `write` has already raised this error
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
    """Return the values with None instead of NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
