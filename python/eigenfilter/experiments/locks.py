"""Locks that let only one command at a time write into a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import output_folder, remove_abandoned

LOCK = ".eigenfilter.lock"
_KEYS = {"work", "process", "machine"}  # entries of a lock file
_MAX_BYTES = 2**16  # of a lock file
POLL = 0.1  # seconds between attempts to take a lock


class FolderBusy(UserError):
    """Another process is writing into the folder."""


@contextmanager
def folder_lock(
    folder: Path, work: str, wait: Callable[[], bool] = lambda: False
) -> Iterator[Path]:
    """Lock a folder for the only process that may write into it.

    Args:
        folder: folder to lock; it is created if it does not exist.
        work: kind of work, such as "sweep" or "demo", for the message that others get.
        wait: called while another process has the lock; waiting ends when it returns False.

    Yields:
        The folder.

    Raises:
        FolderBusy: another process has the lock; the message names its work and its id.
        UserError: see `try_folder_lock`.
    """
    with try_folder_lock(folder, wait, work=work) as acquired:
        if not acquired:
            raise FolderBusy(_busy_message(folder, work))
        remove_abandoned(folder)
        yield folder


@contextmanager
def try_folder_lock(
    folder: Path, wait: Callable[[], bool], name: str = LOCK, work: str = ""
) -> Iterator[bool]:
    """Try to lock a folder. The kernel releases the lock when the process ends in any way.

    Args:
        folder: folder to lock. It is created if it does not exist, and removed at the end if
            nothing was written into it.
        wait: called while another process has the lock; waiting ends when it returns False.
        name: name of the lock file, which exists as long as the lock is held.
        work: kind of work in the folder, which the lock file records.

    Yields:
        Whether the lock was acquired.

    Raises:
        UserError: the folder cannot be created or written to, or its file system has no locks.
    """
    new_folders = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    path = output_folder(folder) / name
    handle = None
    try:
        while (handle := _try_lock(path)) is None and wait():
            time.sleep(POLL)
        if handle is not None:
            about = {"work": work, "process": os.getpid(), "machine": socket.gethostname()}
            os.truncate(handle, 0)
            os.write(handle, json.dumps(about).encode())
    except OSError as error:
        _unlock(path, handle)
        raise UserError(f"cannot write {path}, or lock it: {error.strerror}") from error
    try:
        yield handle is not None
    finally:
        _unlock(path, handle)
        for each in new_folders:
            with suppress(OSError):  # a folder that is not empty stays
                each.rmdir()


def _try_lock(path: Path) -> int | None:
    """Return the handle of the locked file, or None if another process has the lock.

    Raises:
        UserError: a file of this name exists that is not a lock of eigenfilter.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not _is_ours(handle):
                raise UserError(
                    f"{path} is not a lock of eigenfilter; move it away, or give another --out"
                )
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last owner removed the file after this process opened it


def _is_ours(handle: int) -> bool:
    """Return whether a file is a lock of eigenfilter, or is empty."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        return False
    content = os.pread(handle, _MAX_BYTES, 0)
    try:
        return not content or json.loads(content).keys() == _KEYS
    except (ValueError, AttributeError, RecursionError):
        return False


def _unlock(path: Path, handle: int | None) -> None:
    if handle is not None:
        with suppress(OSError):  # the folder may have been removed
            path.unlink()
        fcntl.flock(handle, fcntl.LOCK_UN)  # also releases copies in forked processes
        os.close(handle)


def _busy_message(folder: Path, work: str) -> str:
    return f"{holder(folder, work)}; wait until it has ended, or give another --out"


def holder(folder: Path, work: str) -> str:
    """Describe the process that has the lock of a folder; `work` is used if the lock is empty."""
    where = ""
    with suppress(OSError, ValueError, KeyError, TypeError):  # another process is writing it
        about = json.loads((folder / LOCK).read_text())
        where = f" (process {about['process']} on {about['machine']})"
        work = about["work"] or work
    return f"another {work} is at work in {folder}{where}"
