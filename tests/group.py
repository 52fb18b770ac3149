"""Leaving the process group in a process of a test."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Destroy the group and end the process, whose results are written.

    Something may keep the group, as caches of DTensor do. If one of Gloo's threads still holds a
    tensor when the interpreter shuts down, torch aborts the process (pytorch/pytorch#190489): so it
    does not shut down.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
