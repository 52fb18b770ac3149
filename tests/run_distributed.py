"""The processes behind the fixture `run_distributed` of conftest.py.

To import torch takes seconds, so processes are started once for each number of them, at the first
call, and serve all calls of the session. They wait for the name of a function, call it, and send
back what it returns, or the traceback of its error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import pytest
import torch
import torch.distributed as dist

RunDistributed = Callable[..., list[Any]]

START_LIMIT = 180.0  # seconds until the processes have imported torch and formed their group
CALL_LIMIT = 120.0  # seconds for one call
END_LIMIT = 30.0  # seconds for the processes to end in
GRACE = 3.0  # seconds for the other processes to report too once one of them has failed


class Function(NamedTuple):
    """A function at the top level of a module, as another process finds it."""

    module: str
    path: str
    name: str

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Function:
        """Return the reference to a function.

        Raises:
            ValueError: the function is not a name of its module.
        """
        module = sys.modules[fn.__module__]
        if getattr(module, fn.__qualname__, None) is not fn:
            raise ValueError(
                f"other processes cannot import {fn.__qualname__} of {fn.__module__}; define it at "
                "the top level of its module"
            )
        return cls(fn.__module__, str(module.__file__), fn.__qualname__)

    def load(self) -> Callable[..., Any]:
        """Import the module from its file: pytest's names of test modules belong to no package."""
        if self.module not in sys.modules:
            spec = importlib.util.spec_from_file_location(self.module, self.path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.module] = module
            spec.loader.exec_module(module)
        return getattr(sys.modules[self.module], self.name)


class ProcessPools:
    """One pool for each number of processes, and the results of all calls so far."""

    def __init__(self) -> None:
        self.limit = CALL_LIMIT
        self._pools: dict[int, Pool] = {}
        self._results: dict[Any, list[bytes] | str] = {}

    def run(self, fn: Callable[..., Any], n: int, *args: Any) -> list[Any]:
        """See the fixture `run_distributed`."""
        key = fn, n, pickle.dumps(args)  # by equality 1 would stand for True
        if key not in self._results:
            self._results[key] = self._call(fn, n, args)
        results = self._results[key]
        if isinstance(results, str):
            pytest.fail(results, pytrace=False)
        return [pickle.loads(result) for result in results]  # a copy, which a test may change

    def _call(self, fn: Callable[..., Any], n: int, args: tuple[Any, ...]) -> list[bytes] | str:
        """Return what each process returned, pickled, or the failure in words."""
        message = pickle.dumps((self.limit, Function.of(fn), args))
        try:
            if n not in self._pools:
                self._pools[n] = Pool(n)
            return self._pools[n].call(message, self.limit)
        except ProcessFailure as failure:
            self._discard(n)
            return f"{fn.__qualname__}{args} of {fn.__module__}: {failure}"
        except BaseException:  # such as Ctrl-C: replies may be under way
            self._discard(n)
            raise

    def _discard(self, n: int) -> None:
        if n in self._pools:
            self._pools.pop(n).kill()

    def close(self) -> None:
        """End all processes.

        Raises:
            RuntimeError: a process did not end cleanly.
        """
        codes = [code for pool in self._pools.values() for code in pool.close()]
        self._pools.clear()
        if any(code != 0 for code in codes):
            raise RuntimeError(f"processes of run_distributed ended with the exit codes {codes}")


class ProcessFailure(Exception):
    """What went wrong in which process."""


class Pool:
    """Processes that share a process group."""

    def __init__(self, n: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="run_distributed_")
        self._processes = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        for rank in range(n):
            ours, theirs = context.Pipe()
            args = rank, n, self._folder.name, theirs
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        try:
            self._replies(START_LIMIT)
        except BaseException:
            self.kill()
            raise

    def call(self, message: bytes, limit: float) -> list[bytes]:
        """Return the replies of all processes, by rank; a ProcessFailure says which failed."""
        self._send(message)
        return self._replies(limit)

    def _send(self, message: bytes) -> None:
        for connection in self._connections:
            with contextlib.suppress(ConnectionError):  # it has ended, as its reply will show
                connection.send_bytes(message)

    def _replies(self, limit: float) -> list[bytes]:
        results: dict[int, bytes] = {}
        failures: dict[int, str] = {}
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        end = time.monotonic() + limit + GRACE  # by then each has written where it hangs
        while pending and (ready := wait(list(pending), max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    succeeded, reply = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    succeeded, reply = False, self._death(rank)
                if succeeded:
                    results[rank] = reply
                else:
                    failures[rank] = reply
                    end = min(end, time.monotonic() + GRACE)
        if failures or pending:
            raise ProcessFailure(self._describe(failures, pending.values(), limit))
        return [results[rank] for rank in range(len(self._connections))]

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(GRACE)
        return f"the process ended with exit code {process.exitcode}\n{self._log(rank)}"

    def _log(self, rank: int) -> str:
        """What faulthandler wrote."""
        path = Path(self._folder.name, f"{rank}.log")
        return path.read_text() if path.exists() else ""

    def _describe(self, failures: dict[int, str], pending: Iterable[int], limit: float) -> str:
        """Say what happened in each rank that failed or did not reply, in the order of time."""
        others = "it was still running" if failures else f"it had not ended after {limit:g} s"
        texts = failures | {rank: f"{others}\n{self._log(rank)}" for rank in pending}
        n = len(self._processes)
        return "\n".join(f"in rank {rank} of {n}: {text}" for rank, text in texts.items())

    def close(self) -> list[int | None]:
        """End the processes; return their exit codes, None for one that had to be killed."""
        self._send(b"")
        for process in self._processes:
            process.join(END_LIMIT)
        codes = [process.exitcode for process in self._processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


def serve(rank: int, n: int, folder: str, connection: Connection) -> NoReturn:
    """Call functions in one of the processes until the message is empty, or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # upon Ctrl-C the parent ends this process
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; frameworks warn without it
    with Path(folder, f"{rank}.log").open("w") as log:
        faulthandler.enable(log)
        store = dist.FileStore(str(Path(folder, "store")), n)
        # If the parent is killed, a collective that waits for a process that has ended fails.
        patience = timedelta(seconds=2 * CALL_LIMIT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=patience)
        connection.send_bytes(pickle.dumps((True, b"")))
        with contextlib.suppress(EOFError, ConnectionError):
            while message := connection.recv_bytes():
                connection.send_bytes(pickle.dumps(reply(message, rank, log)))
        leave()


def reply(message: bytes, rank: int, log: IO[str]) -> tuple[bool, bytes | str]:
    """Call the function of a message; return whether it succeeded, and its result or traceback."""
    try:
        limit, function, args = pickle.loads(message)
        faulthandler.dump_traceback_later(limit, file=log)
        fn = function.load()
        with fresh_state():
            result = fn(rank, *args)
            dist.barrier()  # a collective that another rank does not take part in fails here
        return True, pickle.dumps(result)
    except BaseException:  # to which pytest's own failures belong
        return False, traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def fresh_state() -> Iterator[None]:
    """Reset the seed, the number of threads, the default dtype, grad mode and warnings filters."""
    torch.manual_seed(20)  # as in the process of pytest
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("error")
        yield


def leave() -> NoReturn:
    """Destroy the group and end the process, whose results are sent.

    Something may keep the group, as caches of DTensor do. If one of Gloo's threads still holds a
    tensor when the interpreter shuts down, torch aborts the process (pytorch/pytorch#190489): so it
    does not shut down.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
