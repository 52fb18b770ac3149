"""A single thread in a process that was forked from a process with threads.

A fork copies OpenMP's pool without its threads, so that waiting for them hangs. The compiled
kernels detect this and use one thread. torch's operations, which the other backends and the
optimizers use, share the pool. torch is therefore also set to one thread in such a process, as its
own DataLoader does in its workers.
"""

from __future__ import annotations

import os

import torch

from eigenfilter import _core


def watch() -> None:
    """Make processes that are forked from now on use one thread, where more would hang."""
    os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    if _core.is_serial():
        torch.set_num_threads(1)
