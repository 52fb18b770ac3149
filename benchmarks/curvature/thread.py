"""One thread, and a clock of the processor's time on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.timing import Lap


@contextmanager
def one_thread() -> Iterator[None]:
    """All libraries compute on one thread: then the processor's time is nobody else's."""
    import scipy.sparse.linalg  # noqa: F401 - its library has to be there to be limited
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def processor(run: Callable[[], object]) -> Lap:
    """A clock of the processor's time; as the host's it has the time that went by."""
    began, used = time.perf_counter(), time.process_time()
    run()
    return Lap(time.process_time() - used, time.perf_counter() - began)
