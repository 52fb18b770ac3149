"""Copies of tensors and arrays that overlap in memory where their originals do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_ALIGNMENT = 512  # bytes, that of memory on a GPU; more than any on the CPU


def copies_of(values: list[Any]) -> list[Any]:
    """Copies of the tensors and arrays of a list; parameters and all else stay as they are.

    Those that overlap in memory get one copy of the memory that they cover.

    Raises:
        RuntimeError: a tensor was computed from one that requires grad.
    """
    copies = list(values)
    for overlapping in _overlapping(values):
        start = overlapping[0].start
        stop = max(extent.stop for extent in overlapping)
        members = [(extent.position, values[extent.position]) for extent in overlapping]
        if len(members) == 1:
            ((position, value),) = members
            copies[position] = value.clone() if isinstance(value, Tensor) else value.copy()
        elif isinstance(members[0][1], Tensor):
            for position, t in _tensors(members, start // _ALIGNMENT * _ALIGNMENT, stop):
                copies[position] = t
        else:
            for position, array in _arrays(members, start, stop):
                copies[position] = array
    return copies


class _Extent(NamedTuple):
    """The bytes that a tensor or an array covers.

    Attributes:
        owner: the tensor's storage, None for arrays (in the address space of the process), or
            something of its own for one that is copied by itself.
        start, stop: first byte in there, and the one after the last.
        position: that of the value.
    """

    owner: Any
    start: int
    stop: int
    position: int


def _overlapping(values: list[Any]) -> Iterator[list[_Extent]]:
    """The tensors and arrays that are copied, those together that overlap."""
    extents = [e for position, v in enumerate(values) if (e := _extent(v, position)) is not None]
    group: list[_Extent] = []
    stop = 0
    for extent in sorted(extents, key=lambda e: (str(e.owner), e.start)):
        if group and (extent.owner != group[0].owner or extent.start >= stop):
            yield group
            group = []
        stop = max(stop, extent.stop) if group else extent.stop
        group.append(extent)
    if group:
        yield group


def _extent(value: Any, position: int) -> _Extent | None:
    """None for what stays as it is."""
    alone = _Extent(("alone", position), 0, 0, position)
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            raise RuntimeError(
                "A tensor of the batch was computed from one that requires grad, and a method with "
                "ascents evaluates the batch again at other weights, where it has another value: "
                "compute it inside the function that computes the loss, or detach() it"
            )
        if value.requires_grad or isinstance(value, nn.Parameter):
            return None  # its gradient goes there
        if not _is_plain(value):
            return alone
        size = value.element_size()
        strides = (size * stride for stride in value.stride())
        covered = _covered(int(value.storage_offset()) * size, value.shape, strides, size)
        return _Extent(value.untyped_storage()._cdata, *covered, position)
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray or value.size == 0:
            return alone
        address = value.__array_interface__["data"][0]
        covered = _covered(address, value.shape, value.strides, value.itemsize)
        return _Extent(None, *covered, position)
    return None


def _is_plain(t: Tensor) -> bool:
    """Whether it is no more than strides over a storage."""
    if type(t) is not Tensor or t.layout != torch.strided or t.is_nested or t.is_quantized:
        return False
    return t.numel() > 0 and not (t.is_conj() or t.is_neg() or t.is_meta)


def _covered(
    start: int, shape: Iterable[int], strides: Iterable[int], size: int
) -> tuple[int, int]:
    stop = start + size
    for count, stride in zip(shape, strides, strict=True):
        start += min(0, (count - 1) * stride)
        stop += max(0, (count - 1) * stride)
    return start, stop


def _tensors(
    members: list[tuple[int, Tensor]], start: int, stop: int
) -> Iterator[tuple[int, Tensor]]:
    first = members[0][1]
    data = torch.empty(0, dtype=torch.uint8, device=first.device)
    memory = data.set_(first.untyped_storage(), start, (stop - start,), (1,)).clone()
    for position, t in members:
        offset = t.storage_offset() - start // t.element_size()
        copied = torch.empty(0, dtype=t.dtype, device=t.device)
        copied.set_(memory.untyped_storage(), offset, t.shape, t.stride())
        yield position, copied


def _arrays(
    members: list[tuple[int, Any]], start: int, stop: int
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    memory = np.empty(stop - start, dtype=np.uint8)
    ctypes.memmove(memory.ctypes.data, start, stop - start)
    for position, a in members:
        offset = a.__array_interface__["data"][0] - start
        yield position, np.ndarray(a.shape, a.dtype, memory, offset, a.strides)
