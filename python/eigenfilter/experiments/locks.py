"""One command at a time in a folder that it writes into."""

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
_KEYS = {"work", "process", "machine"}  # what a lock says
_MAX_BYTES = 2**16  # bytes that it has at most
POLL = 0.1  # seconds from one look at a lock to the next


class FolderBusy(UserError):
    """Another process writes into the folder."""


@contextmanager
def folder_lock(
    folder: Path, work: str, wait: Callable[[], bool] = lambda: False
) -> Iterator[Path]:
    """Be the only one that writes into a folder.

    Args:
        folder: made if need be.
        work: what is done there, for the message to who comes second: "sweep", "demo".
        wait: asked while another is there whether to go on waiting.

    Yields:
        The folder.

    Raises:
        Busy: another process is there; the message has its work and its number.
        UserError: as `try_folder_lock`.
    """
    with try_folder_lock(folder, wait, work=work) as had:
        if not had:
            raise FolderBusy(_busy_message(folder, work))
        remove_abandoned(folder)
        yield folder


@contextmanager
def try_folder_lock(
    folder: Path, wait: Callable[[], bool], name: str = LOCK, work: str = ""
) -> Iterator[bool]:
    """Lock a folder; a process that ends, however it does, lets go of it.

    Args:
        folder: made if need be, and taken away at the end if nothing was written into it.
        wait: asked while another is there whether to go on waiting.
        name: of the file that is locked, which is there as long as the lock is.
        work: what is done in the folder, which the file then says.

    Yields:
        Whether it was had.

    Raises:
        UserError: the folder cannot be made or written to, or its file system has no locks.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
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
        for each in made:
            with suppress(OSError):  # something was written there
                each.rmdir()


def _try_lock(path: Path) -> int | None:
    """The handle of the locked file; None where another has it.

    Raises:
        UserError: the file is another's, who would miss it.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not _is_ours(handle):
                raise UserError(
                    f"{path} is not a lock of eigenfilter: move it away, or give another --out"
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
        os.close(handle)  # the one before removed the file after it was opened here


def _is_ours(handle: int) -> bool:
    """Whether a file is a lock of ours, or an empty one."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        return False
    content = os.pread(handle, _MAX_BYTES, 0)
    try:
        return not content or json.loads(content).keys() == _KEYS
    except (ValueError, AttributeError, RecursionError):
        return False


def _unlock(path: Path, handle: int | None) -> None:
    if handle is not None:
        with suppress(OSError):  # of a folder that is gone
            path.unlink()
        fcntl.flock(handle, fcntl.LOCK_UN)  # of copies in processes that were forked, too
        os.close(handle)


def _busy_message(folder: Path, work: str) -> str:
    return f"{holder(folder, work)}: wait until it has ended, or give another --out"


def holder(folder: Path, work: str) -> str:
    """Who is at work in a folder, as its lock says; `work` where it says nothing."""
    where = ""
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is just being written, or older
        about = json.loads((folder / LOCK).read_text())
        where = f" (process {about['process']} on {about['machine']})"
        work = about["work"] or work
    return f"another {work} is at work in {folder}{where}"
