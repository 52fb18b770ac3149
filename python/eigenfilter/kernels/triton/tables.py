"""Device tables for the Triton kernels: addresses of tensors, and their chunks.

A program works on one chunk of one tensor. Two int64 tables on the device describe the chunks:

    pointers [roles, n]      address of the i-th tensor of every list
    chunks [4, programs]     tensor, first element, elements, how many of them are accessed 16 bytes
                             at a time

Chunks are grouped by the dtype of the gradients (in a reduction, of the tensors), because a kernel
is compiled for one dtype.

If all addresses of a tensor are multiples of 16, its whole blocks are accessed 16 bytes at a time.
Another tensor (a bucket view, a shard) is accessed element by element, and does not slow the
others.

A table is reused while the data that it was made from is the same, byte for byte. The addresses of
gradients change more often than sizes do, and the table of chunks then stays valid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eigenfilter.kernels.conventions import Table
from eigenfilter.kernels.triton.blocks import Blocks, blocks_for

# A chunk of four blocks makes the tables small beside the tensors, and still cuts a model of
# 25M float32 parameters into several waves of a large GPU.
BLOCKS_IN_CHUNK = 4

Array = npt.NDArray[np.int64]
_Key = tuple[object, ...]
_Value = TypeVar("_Value")

# As the core numbers them.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True, slots=True)
class Tables:
    """The tensors of one call: addresses [roles, n], and by dtype chunks [4, programs].

    blocks: the block sizes that the chunks are cut for.
    """

    pointers: Tensor
    chunks: dict[torch.dtype, Tensor]
    blocks: Blocks

    @property
    def n(self) -> int:
        """The number of tensors in a list."""
        return self.pointers.shape[1]

    @property
    def programs(self) -> int:
        """The number of chunks of all tensors; 0 if all tensors are empty."""
        return sum(chunks.shape[1] for chunks in self.chunks.values())


def tables(kernel: str, like: Tensor, table: Table) -> Tables:
    """Return the tables of the lists of one call.

    Args:
        kernel: name of the kernel, which decides the sizes of the blocks.
        like: a tensor of the first list, for its dtype and device, which must be the current one.
            The tables are for the current stream.
        table: the data that the check of the call's arguments returned.
    """
    blocks = blocks_for(kernel, like.dtype, like.device)
    return _calls.get(
        (*table, like.dtype, blocks),
        like.device,
        lambda: _make(*table, like.dtype, like.device, blocks),
    )


def _make(
    addresses: bytes,
    counts: bytes,
    wide: bytes,
    usual: torch.dtype,
    device: torch.device,
    blocks: Blocks,
) -> Tables:
    """Build the tables from the data that a check has read; each table may come from the cache."""
    sizes = np.frombuffer(counts, dtype=np.int64)
    pointers = np.frombuffer(addresses, dtype=np.int64).reshape(-1, sizes.size)
    aligned = np.bitwise_or.reduce(pointers, axis=0) % 16 == 0
    block = blocks.elements(usual)
    chunks = {}
    for dtype, some in _by_dtype(wide, usual, sizes):
        make = functools.partial(_chunks, some, aligned, block, device)
        chunks[dtype] = _recent.get((some.tobytes(), aligned.tobytes(), block), device, make)
    return Tables(
        pointers=_recent.get((addresses, sizes.size), device, lambda: _upload(pointers, device)),
        chunks=chunks,
        blocks=blocks,
    )


def _chunks(
    sizes: Array, aligned: npt.NDArray[np.bool_], block: int, device: torch.device
) -> Tensor:
    return _upload(cut(sizes, aligned, block), device)


def _by_dtype(wide: bytes, usual: torch.dtype, sizes: Array) -> Iterator[tuple[torch.dtype, Array]]:
    """For each dtype of gradients, the sizes of those that have it, and 0 for the others."""
    if not wide:
        yield usual, sizes
        return
    numbers = np.frombuffer(wide, dtype=np.uint8)
    for number in np.unique(numbers):
        yield _DTYPES[number], np.where(numbers == number, sizes, 0)


def cut(sizes: Array, aligned: npt.NDArray[np.bool_], block: int) -> Array:
    """Return the table of chunks, [4, programs].

    Args:
        sizes: elements of each tensor, [n].
        aligned: whether 16-byte accesses are safe, [n].
        block: elements of a block.
    """
    chunk = BLOCKS_IN_CHUNK * block
    count = -(-sizes // chunk)
    tensor = np.repeat(np.arange(sizes.size), count)
    index = np.arange(tensor.size) - np.repeat(np.cumsum(count) - count, count)
    length = np.minimum(sizes[tensor] - index * chunk, chunk)
    wide = np.where(aligned[tensor], length // block * block, 0)
    return np.stack((tensor, index * chunk, length, wide))


class _Cache(Generic[_Value]):
    """A cache of the most recent values, by key, device and stream.

    The search is linear: keys are many kilobytes long, and comparing them is faster than hashing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: list[tuple[_Key, _Value]] = []

    def get(self, key: _Key, device: torch.device, make: Callable[[], _Value]) -> _Value:
        """Return the value of `make`, cached for `key` on `device`."""
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # The copy happens when the graph is replayed, so its result is useless outside of
                # the graph. Pinned memory taken during a capture is never reused, so its content
                # stays.
                return make()
            # Only later work on the same stream is certain to see the copy.
            key = (torch.cuda.current_stream().cuda_stream, *key)
        key = (device, *key)
        if self._entries and self._entries[0][0] == key:
            return self._entries[0][1]
        entry = next((e for e in self._entries if e[0] == key), None)
        if entry is None:
            entry = (key, make())
        others = [e for e in self._entries if e is not entry]
        self._entries = [entry, *others[: self._capacity - 1]]
        return entry[1]


def _upload(array: Array, device: torch.device) -> Tensor:
    # torch reuses pinned memory only after the copies from it are done.
    staged = torch.empty(array.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


_recent: _Cache[Tensor] = _Cache(capacity=32)
_calls: _Cache[Tables] = _Cache(capacity=32)
