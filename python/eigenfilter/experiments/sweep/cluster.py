"""Runs as tasks of a Ray cluster, whose nodes share the folder of the sweep."""

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

ANSWER = 10.0  # seconds that the head of a cluster has to answer in
POLL = 0.2  # seconds from one word between a run and the one who started it to the next

Event = tuple[str, str, int, Record]


def execute(
    queue: RunQueue,
    *,
    address: str,
    processes: int | None,
    device: str,
    stop: Callable[[], bool],
) -> None:
    """Run what the ledger has waiting, each run in a fresh process of some node.

    A run asks for as many CPUs as it has threads, and a GPU where the cluster has any and the
    device is not "cpu". One whose worker or node is lost is tried again elsewhere, from its
    checkpoint; Ray's own retries are off, so that they are counted and told of.

    Args:
        ledger: what to run.
        address: of the cluster's head; "auto": one that runs on this machine; "local" starts one.
        processes: how many runs at once; None: what the cluster has room for.
        device: "auto", "cpu" or "cuda".
        stop: asked several times a second.

    Raises:
        UserError: there is no cluster at the address, or its nodes cannot run what is asked for.
    """
    with _connected(address):
        pool = _RayPool(queue, processes, _resources(queue, device))
        try:
            pool.run(stop)
        finally:
            pool.kill()


class _RayPool:
    """The tasks at work, and the board that they and this process write on."""

    def __init__(self, queue: RunQueue, processes: int | None, gpus: int) -> None:
        self._queue, self._gpus = queue, gpus
        self._most = processes or len(queue.specs)
        self._names: dict[Any, str] = {}  # by task
        self._started: set[str] = set()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # A run's process serves no other, whatever the run did to it.
        self._run: Any = ray.remote(max_retries=0, max_calls=1)(_run)
        board: Any = ray.remote(_EventBoard)
        self._board = board.options(num_cpus=0, scheduling_strategy=here).remote()

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
            self._propagate_stop(stop)  # before a task is ended that the same signal ended too
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
        """Tell those at work by the board to stop; those that wait for room are taken back."""
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
            words = " ".join(str(error).split())
            self._queue.record_crash(name, f"{type(error).__name__}: {words[:200]}")
        else:
            self._queue.record_end(name, record)


class _EventBoard:
    """An actor beside who started the runs: they write on it what happens, and see when to stop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False

    def write(self, event: list[Event]) -> bool:
        self._events += event
        return self._stopping

    def read(self, stopping: bool) -> list[Event]:
        self._stopping = stopping
        event, self._events = self._events, []
        return event


class _EventSender:
    """A run's way to the board, used a few times a second."""

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
        except RayError:  # nobody waits for the run any more
            self._stopping = True
        self._unsent = []
        self._flushed_at = time.perf_counter()


def _run(name: str, spec: RunSpec, board: Any) -> Record:
    """Attempt a run on the node that this is called on."""
    line = _EventSender(name, board)
    node = ray.get_runtime_context().get_node_id()

    def observe(kind: str, step: int, record: Record) -> None:
        line.observe(kind, step, record | {"node": node} if kind == "start" else record)

    try:
        return attempt_run(spec, stop=line.stop, observe=observe)
    finally:
        line.flush()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connected to a cluster; Ray's own handler of SIGTERM is undone."""
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
        words = " ".join(str(error).split())
        raise UserError(f"cannot join the Ray cluster at {address}: {words}") from error
    with suppress(ValueError):  # signals are handled in the main thread only
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself tries for minutes where nobody answers.

    Raises:
        UserError: it is no address, or nobody answers there.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(f"the address of a Ray cluster is auto, local or HOST:PORT, not {address}")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot join the Ray cluster at {address}: {error}") from error


def _resources(queue: RunQueue, device: str) -> int:
    """The GPUs that a run asks for.

    Raises:
        UserError: no node has what a run needs.
    """
    everything: Any = ray
    nodes = [node["Resources"] for node in everything.nodes() if node["Alive"]]
    largest = {kind: int(max(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU")}
    threads = max(spec.config.threads or 1 for spec in queue.specs.values())
    if threads > largest["CPU"]:
        raise UserError(f"a run has {threads} threads, and the largest node {largest['CPU']} CPUs")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"on a cluster the device is auto, cpu or cuda, not {device}")
    if device == "cuda" and not largest["GPU"]:
        raise UserError("no node of the cluster has a GPU")
    return int(device != "cpu" and largest["GPU"] > 0)
