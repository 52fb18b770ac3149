"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from eigenfilter.experiments.errors import UserError


def replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Put a file in the place of the one before, in one step.

    It is written beside it and reaches the disk before it takes its name, so that whatever happens
    there is a whole file: the new one or the old.

    Args:
        path: where.
        fill: writes the content.

    Raises:
        UserError: the disk is full, or cannot be written to. What was there is there still.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Put a text file in the place of the one before, as `replace` does."""
    replace(path, lambda file: file.write(text.encode()))


def _synchronise(folder: Path) -> None:
    """Have the new name reach the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
