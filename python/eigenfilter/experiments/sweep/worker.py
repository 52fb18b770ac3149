"""A process that executes one run after another for `local`, and ends when its parent ends.

It starts with signals blocked, so that none can end it before its handlers are installed.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import output_folder
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep.folders import RunSpec, attempt_run, failed_record

OUTPUT = "output.txt"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Worker:
    """The worker's end of the connection to the process that started it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._specs: queue.SimpleQueue[RunSpec | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: self._stop.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=self._listen, daemon=True).start()

    def work(self) -> None:
        """Execute runs until there are no more."""
        while (spec := self._specs.get()) is not None:
            try:
                with output(spec.folder):
                    record = attempt_run(spec, stop=self._stop.is_set, observe=self._send)
            except (OSError, UserError) as error:  # the folder cannot be written to
                record = failed_record(spec.config, str(error))
            self._send("end", 0, record)

    def _send(self, kind: str, step: int, record: Record) -> None:
        try:
            self._connection.send((kind, step, record))
        except OSError:  # the parent has ended
            self._stop.set()

    def _listen(self) -> None:
        """Receive runs. None, or the end of the parent, stops the current run."""
        try:
            while (spec := self._connection.recv()) is not None:
                self._specs.put(spec)
        except (EOFError, OSError):
            pass
        self._stop.set()
        self._specs.put(None)


@contextmanager
def output(folder: Path) -> Iterator[None]:
    """Redirect standard output and error to a file in the folder; remove it if it stays empty."""
    path = output_folder(folder) / OUTPUT
    with path.open("ab") as file:
        saved = {handle: os.dup(handle) for handle in (1, 2)}
        for handle in saved:
            os.dup2(file.fileno(), handle)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for handle, copy in saved.items():
            os.dup2(copy, handle)
            os.close(copy)
        if not path.stat().st_size:
            path.unlink()


def main() -> None:
    """Work for the process at the other end of the file descriptor in the first argument."""
    faulthandler.enable()
    Worker(Connection(int(sys.argv[1]))).work()
