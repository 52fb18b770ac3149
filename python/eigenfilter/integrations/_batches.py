"""Copies of batches, for evaluations that come after the first."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor


def copy_of(batch: Any, *, tensors: bool = True) -> Any:
    """A copy of the mappings, lists and tuples of a batch, and of the tensors in them.

    An evaluation may take an entry from its batch (label smoothing pops the labels), or write to a
    tensor of it (noise, masks). One that comes later must see the batch as it was.

    Args:
        batch: mapping, list, tuple or tensor. Other objects are not copied.
        tensors: whether tensors are copied too.
    """
    if isinstance(batch, Tensor):
        # One that requires grad is a parameter, or computed from some: its gradient goes there.
        return batch if batch.requires_grad or not tensors else batch.clone()
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = copy_of(value, tensors=tensors)
        return copied
    if isinstance(batch, list):
        return [copy_of(value, tensors=tensors) for value in batch]
    if isinstance(batch, tuple):
        values = [copy_of(value, tensors=tensors) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
