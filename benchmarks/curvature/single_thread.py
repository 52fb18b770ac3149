"""Computation on one thread, and a clock of the processor's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.timing import Timing


@contextmanager
def single_thread() -> Iterator[None]:
    """Make all libraries compute on one thread: a process's CPU time is then the work's own."""
    import scipy.sparse.linalg  # noqa: F401 - only a library that is loaded can be limited
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def cpu_clock(run: Callable[[], object]) -> Timing:
    """A clock of the processor's time; the host's time is the time that went by."""
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    run()
    return Timing(time.process_time() - cpu_start, time.perf_counter() - wall_start)
