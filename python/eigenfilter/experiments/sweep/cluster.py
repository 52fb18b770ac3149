"""Runs as tasks on a Ray cluster whose nodes share the folder of the sweep."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep.folders import RunSpec, attempt_run
from eigenfilter.experiments.sweep.run_queue import RunQueue

CONNECT_TIMEOUT = 10.0  # seconds
POLL = 0.2  # seconds between exchanges of events with the runs

Event = tuple[str, str, int, Record]
"""The name of a run, and the kind, step and values of a record."""


def execute(
    queue: RunQueue,
    *,
    address: str,
    processes: int | None,
    device: str,
    stop: Callable[[], bool],
) -> None:
    """Execute the pending runs of a queue, each in a new process on some node.

    A run requests as many CPUs as it has threads, and a GPU if the cluster has any and the device
    is not "cpu". If its worker or node is lost, it is retried elsewhere from its checkpoint. Ray's
    own retries are disabled, so that the queue counts and reports them.

    Args:
        queue: the runs.
        address: address of the cluster's head; "auto" for a cluster on this machine, "local" to
            start one.
        processes: number of runs at a time; None means as many as the cluster can execute.
        device: "auto", "cpu" or "cuda".
        stop: called several times a second; when it returns True, all runs stop.

    Raises:
        UserError: there is no cluster at the address, or its nodes lack the resources.
    """
    with _connected(address):
        pool = _RayPool(queue, processes, _resources(queue, device))
        try:
            pool.run(stop)
        finally:
            pool.kill()


class _RayPool:
    """The running tasks, and the board through which they exchange events with this process."""

    def __init__(self, queue: RunQueue, processes: int | None, gpus: int) -> None:
        self._queue, self._gpus = queue, gpus
        self._most = processes or len(queue.specs)
        self._names: dict[Any, str] = {}  # names of runs by task
        self._started: set[str] = set()
        this_node = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        # A process executes one run only, so that a run cannot affect later ones.
        self._run: Any = ray.remote(max_retries=0, max_calls=1)(_run)
        board: Any = ray.remote(_EventBoard)
        self._board = board.options(num_cpus=0, scheduling_strategy=this_node).remote()

    def run(self, stop: Callable[[], bool]) -> None:
        queue = self._queue
        while queue.pending or self._names:
            self._propagate_stop(stop)
            while queue.pending and len(self._names) < self._most:
                name = queue.pending.popleft()
                self._names[self._submit(name)] = name
            ready, _ = ray.wait(list(self._names), timeout=POLL) if self._names else ([], [])
            for event in ray.get(self._board.read.remote(queue.stopping)):
                self._started.add(event[0])
                queue.observe(*event)
            # The same signal may have ended tasks too: stop before their ends are recorded.
            self._propagate_stop(stop)
            for task in ready:
                self._end(task)

    def kill(self) -> None:
        for task in self._names:
            ray.cancel(task, force=True)
        ray.kill(self._board)

    def _submit(self, name: str) -> Any:
        spec = self._queue.specs[name]
        run = self._run.options(
            num_cpus=spec.config.threads or 1,
            num_gpus=self._gpus,
            scheduling_strategy="SPREAD",
        )
        return run.remote(name, replace(spec, folder=spec.folder.resolve()), self._board)

    def _propagate_stop(self, stop: Callable[[], bool]) -> None:
        """Stop running tasks through the board, and cancel tasks that wait for resources."""
        if self._queue.stopping or not stop():
            return
        self._queue.stop()
        for task, name in self._names.items():
            if name not in self._started:
                ray.cancel(task)

    def _end(self, task: Any) -> None:
        name = self._names.pop(task)
        self._started.discard(name)
        try:
            record = ray.get(task)
        except RayError as error:
            reason = " ".join(str(error).split())
            self._queue.record_crash(name, f"{type(error).__name__}: {reason[:200]}")
        else:
            self._queue.record_end(name, record)


class _EventBoard:
    """A Ray actor that collects the events of all runs, and tells the runs when to stop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False

    def write(self, events: list[Event]) -> bool:
        self._events += events
        return self._stopping

    def read(self, stopping: bool) -> list[Event]:
        self._stopping = stopping
        events, self._events = self._events, []
        return events


class _EventSender:
    """Sends the events of one run to the board, at most once every POLL seconds."""

    def __init__(self, name: str, board: Any) -> None:
        self._name, self._board = name, board
        self._unsent: list[Event] = []
        self._stopping = False
        self._flushed_at = 0.0

    def observe(self, kind: str, step: int, record: Record) -> None:
        self._unsent.append((self._name, kind, step, record))
        self.stop()

    def stop(self) -> bool:
        if time.perf_counter() - self._flushed_at >= POLL:
            self.flush()
        return self._stopping

    def flush(self) -> None:
        try:
            self._stopping = ray.get(self._board.write.remote(self._unsent))
        except RayError:  # the process that started the run has ended
            self._stopping = True
        self._unsent = []
        self._flushed_at = time.perf_counter()


def _run(name: str, spec: RunSpec, board: Any) -> Record:
    """Attempt a run on the node that executes this task."""
    sender = _EventSender(name, board)
    node = ray.get_runtime_context().get_node_id()

    def observe(kind: str, step: int, record: Record) -> None:
        sender.observe(kind, step, record | {"node": node} if kind == "start" else record)

    try:
        return attempt_run(spec, stop=sender.stop, observe=observe)
    finally:
        sender.flush()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connect to a cluster inside the context, and restore the handler of SIGTERM that Ray sets."""
    _check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot join the Ray cluster at {address}: {reason}") from error
    with suppress(ValueError):  # handlers can be set in the main thread only
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that a cluster listens at an address, because Ray itself would retry for minutes.

    Raises:
        UserError: the address is invalid, or nothing listens there.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(f"the address of a Ray cluster is auto, local or HOST:PORT, not {address}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot join the Ray cluster at {address}: {error}") from error


def _resources(queue: RunQueue, device: str) -> int:
    """Return the number of GPUs that a run requests.

    Raises:
        UserError: no node has the resources that a run needs.
    """
    untyped_ray: Any = ray
    nodes = [node["Resources"] for node in untyped_ray.nodes() if node["Alive"]]
    largest = {kind: int(max(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU")}
    threads = max(spec.config.threads or 1 for spec in queue.specs.values())
    if threads > largest["CPU"]:
        raise UserError(
            f"a run has {threads} threads, and the largest node {largest['CPU']} CPUs; "
            "lower threads"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"on a cluster the device is auto, cpu or cuda, not {device}")
    if device == "cuda" and not largest["GPU"]:
        raise UserError("no node of the cluster has a GPU; give --device cpu")
    return int(device != "cpu" and largest["GPU"] > 0)
