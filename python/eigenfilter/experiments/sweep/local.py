"""Runs in processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait

import torch

from eigenfilter.experiments.config import Config
from eigenfilter.experiments.devices import device_of
from eigenfilter.experiments.sweep.folders import RunSpec
from eigenfilter.experiments.sweep.run_queue import RunQueue
from eigenfilter.experiments.sweep.worker import OUTPUT, SIGNALS

POLL = 0.2  # seconds from one question whether to stop to the next
GRACE = 5.0  # seconds that a process may take to end after it closed its connection
WORKER = "from eigenfilter.experiments.sweep.worker import main; main()"


def execute(
    queue: RunQueue, *, processes: int | None, device: str, stop: Callable[[], bool]
) -> None:
    """Run what the ledger has waiting, as many at once as `processes`; see `execution.execute`.

    Importing torch takes seconds, so that a process whose run came to its end, or diverged, gets
    the next; after anything else it is replaced.
    """
    devices = _devices(device)
    configs = [spec.config for spec in queue.specs.values()]
    count = min(processes or default_processes(device, configs), len(queue.pending))
    pool = _LocalPool(queue, [devices[i % len(devices)] for i in range(count)])
    try:
        pool.run(stop)
    finally:
        pool.kill()


class _LocalPool:
    """A process for each of some devices, started when it is needed."""

    def __init__(self, queue: RunQueue, devices: list[str]) -> None:
        self._queue = queue
        self._free = devices
        self._workers: list[_WorkerProcess] = []

    def run(self, stop: Callable[[], bool]) -> None:
        queue = self._queue
        while queue.pending or any(worker.name is not None for worker in self._workers):
            self._propagate_stop(stop)
            self._assign()
            connections = wait([worker.connection for worker in self._workers], POLL)
            self._propagate_stop(stop)  # before a worker's word that the same signal stopped it too
            for ready in connections:
                self._receive(next(w for w in self._workers if w.connection is ready))

    def kill(self) -> None:
        while self._workers:
            self._remove(self._workers[0])

    def _propagate_stop(self, stop: Callable[[], bool]) -> None:
        if not self._queue.stopping and stop():
            self._queue.stop()
            for worker in self._workers:
                worker.send(None)

    def _assign(self) -> None:
        queue = self._queue
        idle = [worker for worker in self._workers if worker.name is None]
        while queue.pending and (idle or self._free):
            if not idle:
                self._workers.append(_WorkerProcess(self._free.pop(0)))
                idle.append(self._workers[-1])
            worker, name = idle.pop(), queue.pending.popleft()
            worker.name = name
            worker.send(replace(queue.specs[name], device=worker.device))

    def _receive(self, worker: _WorkerProcess) -> None:
        name = worker.name
        try:
            kind, step, record = worker.connection.recv()
        except (EOFError, OSError):
            reason = worker.reason()
            self._remove(worker)
            if name is not None:
                self._queue.record_crash(name, reason)
            return
        assert name is not None
        if kind != "end":
            self._queue.observe(name, kind, step, record)
            return
        worker.name = None
        if record["outcome"] != "complete" and not record.get("diverged"):
            self._remove(worker)
        self._queue.record_end(name, record)

    def _remove(self, worker: _WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)
        self._free.append(worker.device)


class _WorkerProcess:
    """A worker seen from here.

    Attributes:
        device: its own.
        name: of the run that it has, or None.
        connection: to it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.name: str | None = None
        self.connection, theirs = Pipe()
        # Blocked until it handles them, signals to all of us do not end it while it imports.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", WORKER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def send(self, message: RunSpec | None) -> None:
        """Give an order; None: to stop."""
        with suppress(OSError):  # it is no more, as its end of the connection says too
            self.connection.send(message)

    def kill(self) -> None:
        """End it, if it has not ended, and wait until it has."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def reason(self) -> str:
        """Why it ended, in one line, once its end of the connection is closed."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "its process closed its connection"
        if code >= 0:
            return f"its process ended with exit code {code}: see {OUTPUT}"
        words = f"its process was killed by {signal.Signals(-code).name}"
        return words + " (by the system, where memory is short)" * (code == -signal.SIGKILL)


def _devices(name: str) -> list[str]:
    """The devices that processes share in turn."""
    device = device_of(name)
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)]


def default_processes(device: str, configs: Iterable[Config]) -> int:
    """How many processes the machine is for: one a GPU, or its cores over their threads."""
    devices = _devices(device)
    if devices != ["cpu"]:
        return len(devices)
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(config.threads or cores for config in configs))
