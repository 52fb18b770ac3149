"""One thread in a process that was forked from one with threads.

OpenMP's pool is copied by a fork, and its threads are not: whoever waits for them waits for ever.
The compiled kernels notice and work alone. torch's operations, which the other backends and the
optimizers use beside the kernels, share the pool: in such a process torch, too, is told to use one
thread, as its own DataLoader tells its workers.
"""

from __future__ import annotations

import os

import torch

from eigenfilter import _core


def watch() -> None:
    """Let every process that is forked from now on use one thread, where more would hang."""
    os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    if _core.is_serial():
        torch.set_num_threads(1)
