"""Device tables for the Triton kernels: where the tensors are, and how they are cut into chunks.

A program works on one chunk of one tensor. Two int64 tables on the device say which:

    pointers [roles, n]      address of the i-th tensor of every list
    chunks [4, programs]     tensor, first element, elements, how many of them are accessed 16 bytes
                             at a time

There are chunks for each dtype that gradients have (in a reduction: that tensors have), since a
kernel is compiled for one.

Where all addresses of a tensor are multiples of 16, its whole blocks are accessed that way; else (a
bucket view, a shard) it is accessed element by element, and slows nobody else.

Tables are used again where what they were made of is the same, byte for byte. Gradients move more
often than sizes change, and the table of chunks is then still good.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eigenfilter.kernels.triton_blocks import Blocks, chosen

if TYPE_CHECKING:
    from eigenfilter._core import Table

# A chunk of four blocks makes the tables small beside what they describe, and still cuts a model of
# 25M float32 parameters into several waves of a large GPU.
BLOCKS_IN_CHUNK = 4

Array = npt.NDArray[np.int64]
_Key = tuple[object, ...]
_Made = TypeVar("_Made")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as the core numbers them


@dataclass(frozen=True, slots=True)
class Tables:
    """The tensors of one call: addresses [roles, n], and by dtype chunks [4, programs].

    blocks: the sizes that the chunks are cut for.
    """

    pointers: Tensor
    chunks: dict[torch.dtype, Tensor]
    blocks: Blocks

    @property
    def n(self) -> int:
        """Tensors in a list."""
        return self.pointers.shape[1]

    @property
    def programs(self) -> int:
        """Chunks of all tensors; none where all tensors are empty."""
        return sum(chunks.shape[1] for chunks in self.chunks.values())


def tables(kernel: str, like: Tensor, read: Table | None) -> Tables:
    """Return the tables of the lists of one call.

    Args:
        kernel: that is called, for the sizes of its blocks.
        like: a tensor of the first list, for its dtype and device, which must be the current one.
            The tables are for the current stream.
        read: what the check of the call's arguments returned.
    """
    assert read is not None
    blocks = chosen(kernel, like.dtype, like.device)
    return _calls.get(
        (*read, like.dtype, blocks),
        like.device,
        lambda: _make(*read, like.dtype, like.device, blocks),
    )


def _make(
    addresses: bytes,
    counts: bytes,
    wide: bytes,
    usual: torch.dtype,
    device: torch.device,
    blocks: Blocks,
) -> Tables:
    """The tables of what a check has read; a part may be there from another call."""
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
    """By dtype of the gradients: the sizes of those that have it, and 0 for the others."""
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


class _Recent(Generic[_Made]):
    """What was made last, and is good for the same key on the same device and stream.

    Searched one by one: keys are many kilobytes, and sooner found different than hashed.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: list[tuple[_Key, _Made]] = []

    def get(self, key: _Key, device: torch.device, make: Callable[[], _Made]) -> _Made:
        """Return what `make` returns, or returned before for `key` on `device`."""
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # This copy happens when the graph is replayed: useless outside of the graph. Pinned
                # memory taken during a capture is never used again, so that it stays as it is.
                return make()
            # A copy is certain to have happened only for what follows it on its stream.
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
    # torch gives pinned memory to somebody else only after the copies from it are done.
    staged = torch.empty(array.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


_recent: _Recent[Tensor] = _Recent(capacity=32)
_calls: _Recent[Tables] = _Recent(capacity=32)
