"""Copies of batches, for evaluations that come after the first."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import MutableMapping
from typing import Any

import numpy as np
from torch import Tensor, nn


def copy_of(batch: Any) -> Any:
    """A copy of the containers of a batch, and of the tensors and arrays in them.

    An evaluation may take an entry from its batch (label smoothing pops the labels), or write to a
    tensor of it (noise, masks). One that comes later must see the batch as it was.

    Args:
        batch: mapping, list, tuple, tensor, array, arguments of a `functools.partial`, dataclass,
            or another object that has tensors as attributes or a method `to`. Modules and what
            else can be called are not copied, nor other objects.

    Raises:
        RuntimeError: a tensor was computed from one that requires grad.
    """
    if isinstance(batch, Tensor):
        if batch.grad_fn is not None:
            raise RuntimeError(
                "A tensor of the batch was computed from one that requires grad, and a method with "
                "ascents evaluates the batch again at other weights, where it has another value: "
                "compute it inside the function that computes the loss, or detach() it"
            )
        # One that requires grad is a parameter: its gradient goes there.
        return batch if batch.requires_grad else batch.clone()
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = copy_of(value)
        return copied
    if isinstance(batch, list):
        return [copy_of(value) for value in batch]
    if isinstance(batch, tuple):
        values = [copy_of(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if isinstance(batch, functools.partial):
        return functools.partial(batch.func, *copy_of(batch.args), **copy_of(batch.keywords))
    attributes = _attributes(batch)
    if attributes:
        copied = copy.copy(batch)
        for name, value in attributes.items():
            object.__setattr__(copied, name, copy_of(value))  # of frozen dataclasses, too
        return copied
    return batch


def _attributes(batch: Any) -> dict[str, Any]:
    """The attributes of an object that is a batch; none of another one."""
    if isinstance(batch, (type, nn.Module)) or callable(batch):
        return {}
    if dataclasses.is_dataclass(batch):
        names = [field.name for field in dataclasses.fields(batch)]
        found = {name: getattr(batch, name) for name in names if hasattr(batch, name)}
        return found | getattr(batch, "__dict__", {})
    found = dict(getattr(batch, "__dict__", {}))
    has_tensors = any(isinstance(value, Tensor) for value in found.values())
    return found if has_tensors or hasattr(batch, "to") else {}
