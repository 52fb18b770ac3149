"""Files that are written whole or not at all, and read with one clear error."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from eigenfilter.experiments.errors import UserError

NEW = ".new"
"""What the names of files end with that are not whole yet."""

_ABANDONED = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(NEW)}", re.DOTALL)


def replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Put a file in the place of the one before, in one step.

    It is written beside it, under a name of its own, and reaches the disk before it takes its name,
    so that whatever happens, and whoever else writes it, there is a whole file. It has the mode of
    the one before; a link stays, and the file that it names is replaced. What is no file, such as
    a pipe or /dev/stdout, is written into.

    Args:
        path: where.
        fill: writes the content.

    Raises:
        UserError: the disk is full, or cannot be written to. What was there is there still.
    """
    try:
        mode = _mode(path)
        if mode is None or stat.S_ISREG(mode):
            _replace(Path(os.path.realpath(path)), fill, mode)
        else:
            with path.open("wb") as file:
                fill(file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _mode(path: Path) -> int | None:
    """The type and permissions of a file; None if there is none."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _replace(path: Path, fill: Callable[[BinaryIO], object], mode: int | None) -> None:
    # The name is cut, because one of 255 bytes has no room for more.
    beside = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}{NEW}")
    try:
        with beside.open("xb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # `remove_abandoned` leaves it alone
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # as on a disk that became one to be read only
            beside.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    """Put a text file in the place of the one before, as `replace` does."""
    replace(path, lambda file: file.write(text.encode()))


def remove_abandoned(folder: Path) -> None:
    """Remove the files that processes were killed over while they wrote them."""
    for path in folder.glob(f".*{NEW}"):
        if not _ABANDONED.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
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


def _sync_folder(folder: Path) -> None:
    """Have the new name reach the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_folder(path: Path) -> Path:
    """The folder, made if need be.

    Raises:
        UserError: if it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
    return path
