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
from eigenfilter.experiments.sweep.folders import Order, attempt
from eigenfilter.experiments.sweep.ledger import Ledger

ANSWER = 10.0  # seconds that the head of a cluster has to answer in
POLL = 0.2  # seconds from one word between a run and the one who started it to the next

Seen = tuple[str, str, int, Record]


def execute(
    ledger: Ledger,
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
        pool = _Pool(ledger, processes, _resources(ledger, device))
        try:
            pool.run(stop)
        finally:
            pool.kill()


class _Pool:
    """The tasks at work, and the board that they and this process write on."""

    def __init__(self, ledger: Ledger, processes: int | None, gpus: int) -> None:
        self._ledger, self._gpus = ledger, gpus
        self._most = processes or len(ledger.orders)
        self._names: dict[Any, str] = {}  # by task
        self._began: set[str] = set()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # A run's process serves no other, whatever the run did to it.
        self._run: Any = ray.remote(max_retries=0, max_calls=1)(_run)
        board: Any = ray.remote(_Board)
        self._board = board.options(num_cpus=0, scheduling_strategy=here).remote()

    def run(self, stop: Callable[[], bool]) -> None:
        ledger = self._ledger
        while ledger.waiting or self._names:
            self._heed(stop)
            while ledger.waiting and len(self._names) < self._most:
                name = ledger.waiting.popleft()
                self._names[self._submit(name)] = name
            ready, _ = ray.wait(list(self._names), timeout=POLL) if self._names else ([], [])
            for seen in ray.get(self._board.read.remote(ledger.stopping)):
                self._began.add(seen[0])
                ledger.observe(*seen)
            self._heed(stop)  # before a task is ended that the same signal ended too
            for task in ready:
                self._end(task)

    def kill(self) -> None:
        for task in self._names:
            ray.cancel(task, force=True)
        ray.kill(self._board)

    def _submit(self, name: str) -> Any:
        order = self._ledger.orders[name]
        run = self._run.options(
            num_cpus=order.config.threads or 1,
            num_gpus=self._gpus,
            scheduling_strategy="SPREAD",
        )
        return run.remote(name, replace(order, folder=order.folder.resolve()), self._board)

    def _heed(self, stop: Callable[[], bool]) -> None:
        """Tell those at work by the board to stop; those that wait for room are taken back."""
        if self._ledger.stopping or not stop():
            return
        self._ledger.stop()
        for task, name in self._names.items():
            if name not in self._began:
                ray.cancel(task)

    def _end(self, task: Any) -> None:
        name = self._names.pop(task)
        self._began.discard(name)
        try:
            record = ray.get(task)
        except RayError as error:
            words = " ".join(str(error).split())
            self._ledger.crashed(name, f"{type(error).__name__}: {words[:200]}")
        else:
            self._ledger.ended(name, record)


class _Board:
    """An actor beside who started the runs: they write on it what happens, and see when to stop."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._stopping = False

    def write(self, seen: list[Seen]) -> bool:
        self._seen += seen
        return self._stopping

    def read(self, stopping: bool) -> list[Seen]:
        self._stopping = stopping
        seen, self._seen = self._seen, []
        return seen


class _Line:
    """A run's way to the board, used a few times a second."""

    def __init__(self, name: str, board: Any) -> None:
        self._name, self._board = name, board
        self._unsaid: list[Seen] = []
        self._stopping = False
        self._said_at = 0.0

    def observe(self, kind: str, step: int, record: Record) -> None:
        self._unsaid.append((self._name, kind, step, record))
        self.stop()

    def stop(self) -> bool:
        if time.perf_counter() - self._said_at >= POLL:
            self.say()
        return self._stopping

    def say(self) -> None:
        try:
            self._stopping = ray.get(self._board.write.remote(self._unsaid))
        except RayError:  # nobody waits for the run any more
            self._stopping = True
        self._unsaid = []
        self._said_at = time.perf_counter()


def _run(name: str, order: Order, board: Any) -> Record:
    """Attempt a run on the node that this is called on."""
    line = _Line(name, board)
    node = ray.get_runtime_context().get_node_id()

    def observe(kind: str, step: int, record: Record) -> None:
        line.observe(kind, step, record | {"node": node} if kind == "start" else record)

    try:
        return attempt(order, stop=line.stop, observe=observe)
    finally:
        line.say()


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


def _resources(ledger: Ledger, device: str) -> int:
    """The GPUs that a run asks for.

    Raises:
        UserError: no node has what a run needs.
    """
    everything: Any = ray
    nodes = [node["Resources"] for node in everything.nodes() if node["Alive"]]
    most = {kind: int(max(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU")}
    threads = max(order.config.threads or 1 for order in ledger.orders.values())
    if threads > most["CPU"]:
        raise UserError(f"a run has {threads} threads, and the largest node {most['CPU']} CPUs")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"on a cluster the device is auto, cpu or cuda, not {device}")
    if device == "cuda" and not most["GPU"]:
        raise UserError("no node of the cluster has a GPU")
    return int(device != "cpu" and most["GPU"] > 0)
