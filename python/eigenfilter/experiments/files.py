"""Files that are written whole or not at all, and read with one clear error."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from eigenfilter.experiments.errors import UserError

NEW = ".new"
"""What the names of files end with that are not whole yet."""


def replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Put a file in the place of the one before, in one step.

    It is written beside it, under a name of its own, and reaches the disk before it takes its name,
    so that whatever happens, and whoever else writes it, there is a whole file.

    Args:
        path: where.
        fill: writes the content.

    Raises:
        UserError: the disk is full, or cannot be written to. What was there is there still.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{NEW}")
    try:
        with beside.open("xb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # `remove_abandoned` leaves it alone
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


def remove_abandoned(folder: Path) -> None:
    """Remove the files that processes were killed over while they wrote them."""
    for path in folder.glob(f".*{NEW}"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # being written, or another's: it does no harm
            continue


def read_json(path: Path, remedy: str) -> Any:
    """What a file of JSON holds.

    Args:
        path: the file.
        remedy: what to do if it is damaged.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read, or is damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!s:.120}): {remedy}") from error


def _synchronise(folder: Path) -> None:
    """Have the new name reach the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
