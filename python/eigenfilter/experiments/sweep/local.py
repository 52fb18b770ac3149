"""Runs in processes on this machine."""

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

POLL = 0.2  # seconds between checks of the stop condition
GRACE = 5.0  # seconds that a process may take to end after its connection closed
WORKER = "from eigenfilter.experiments.sweep.worker import main; main()"


def execute(
    queue: RunQueue, *, processes: int | None, device: str, stop: Callable[[], bool]
) -> None:
    """Execute the pending runs of a queue, at most `processes` at a time; see `execution.execute`.

    Importing torch takes seconds, so a process whose run is complete or diverged takes the next
    run. After any other end it is replaced.
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
    """One worker process per entry of `devices`, started on demand."""

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
            # The same signal may have stopped workers too: stop before their ends are recorded.
            self._propagate_stop(stop)
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
    """A worker process, seen from the process that started it.

    Attributes:
        device: the worker's device.
        name: name of its current run, or None.
        connection: connection to the worker.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.name: str | None = None
        self.connection, theirs = Pipe()
        # The worker starts with signals blocked and unblocks them once it handles them, so that a
        # signal to the whole process group does not end it during its imports.
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
        """Send a run to execute, or None to stop."""
        with suppress(OSError):  # the worker has ended, which `_receive` will notice
            self.connection.send(message)

    def kill(self) -> None:
        """Kill the process if it is still running, and wait for its end."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def reason(self) -> str:
        """Return in one line why the process ended, after its connection closed."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "its process closed its connection"
        if code >= 0:
            return f"its process ended with exit code {code}; see {OUTPUT}"
        reason = f"its process was killed by {signal.Signals(-code).name}"
        return reason + " (the system does so when memory is short)" * (code == -signal.SIGKILL)


def _devices(name: str) -> list[str]:
    """Return the devices among which the processes are distributed."""
    device = device_of(name)
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)]


def default_processes(device: str, configs: Iterable[Config]) -> int:
    """Return the default number of processes: one per GPU, or CPU cores over threads per run."""
    devices = _devices(device)
    if devices != ["cpu"]:
        return len(devices)
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(config.threads or cores for config in configs))
