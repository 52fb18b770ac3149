"""Accelerate's state, which all accelerators of a process share, in a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate shares its state among all accelerators of a process."""
    reset_state()
    yield
    reset_state()


def reset_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def with_scaler(accelerator: Any, scale: float) -> Any:
    """An accelerator whose mixed precision is fp16's, which Accelerate refuses on the CPU."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


@contextmanager
def launched(rank: int, processes: int) -> Iterator[None]:
    """The environment that `accelerate launch` makes for a process."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    names = {name: str(value) for name, value in ranks.items()}
    names |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(processes)}
    before = dict(os.environ)
    os.environ.update(names)
    reset_state()
    try:
        yield
    finally:
        reset_state()
        os.environ.clear()
        os.environ.update(before)
