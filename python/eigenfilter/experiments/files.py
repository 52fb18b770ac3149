"""Files that are replaced atomically, and read with one clear error."""

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
"""Suffix of files that are still being written."""

_ABANDONED = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(NEW)}", re.DOTALL)


def replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically.

    The content is written to a temporary file in the same folder and synchronized to the disk
    before it takes the name. Whatever happens, and whoever else writes the file, a whole file
    remains. The new file keeps the mode of the old one. A symbolic link stays, and its target is
    replaced. A path that is not a regular file, such as a pipe or /dev/stdout, is written into.

    Args:
        path: path of the file.
        fill: function that writes the content.

    Raises:
        UserError: the disk is full or cannot be written to. The old file is unchanged.
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
    """Return the type and the permissions of a file, or None if it does not exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _replace(path: Path, fill: Callable[[BinaryIO], object], mode: int | None) -> None:
    # The name is truncated because names are limited to 255 bytes.
    temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}{NEW}")
    try:
        with temporary.open("xb") as file:
            # `remove_abandoned` leaves locked files alone.
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # such as on a file system that became read-only
            temporary.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    """Replace a text file atomically; see `replace`."""
    replace(path, lambda file: file.write(text.encode()))


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files of processes that were killed while writing them."""
    for path in folder.glob(f".*{NEW}"):
        if not _ABANDONED.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # the file is being written, or belongs to another user
            continue


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        remedy: what the user should do if the file is damaged, for the message.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file cannot be read, or is damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!s:.120}); {remedy}") from error


def _sync_folder(folder: Path) -> None:
    """Synchronize the folder to the disk, so that the new name is on it too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_folder(path: Path) -> Path:
    """Create the folder if it does not exist, and return it.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
    return path
