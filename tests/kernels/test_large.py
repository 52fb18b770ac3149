"""Calls that exceed the last-level cache, where what is only written goes past the caches.

Whole blocks then have to start where memory is aligned: tensors here miss alignment by every number
of elements up to a block and beyond. The same work in calls that fit the cache is the yardstick.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cases import UPDATES, Update, bits, nonzero
from eigenfilter import _core

SHIFTS = 18  # tensors in a list, each by one more element off alignment, and as many small ones
SMALL = (0, 1, 5, 15, 31, 70)
GAPS = 2**16  # bytes between the tensors of a list and after them, more than enough
CAPACITY = 448 * 2**20  # of a cache that these tests can exceed in less than 2 GiB
_SC_LEVEL3_CACHE_SIZE = 194  # glibc's

# Updates that write what they do not read; an adaptive ascent does it as a plain one.
PAST_THE_CACHES = [u for u in UPDATES if "backups" in u.lists and u.variant != "adaptive"]


def cache_bytes() -> int:
    """The last-level cache as the kernels see it: 32 MiB where the system does not say."""
    try:
        size = os.sysconf(_SC_LEVEL3_CACHE_SIZE)
    except (OSError, ValueError):
        size = 0
    return size if size > 0 else 32 * 2**20


def bytes_of(lists: int) -> int:
    """Bytes of a list of which all but one of so many exceed the cache."""
    return -(-cache_bytes() // (lists - 1) // 64) * 64


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """For twice the lists of any update, and their gaps; touched once for all tests."""
    if cache_bytes() > CAPACITY:
        pytest.skip(f"needs 3 times the cache in memory, and that has {cache_bytes()} bytes")
    counts = {len(update.lists) for update in PAST_THE_CACHES}
    return torch.zeros(max(2 * n * (bytes_of(n) + GAPS) for n in counts), dtype=torch.uint8)


def stretches(memory: Tensor, update: Update, dtype: torch.dtype) -> list[Tensor]:
    """Memory for each of the update's lists, and as much again."""
    count = len(update.lists)
    size = bytes_of(count) + GAPS
    return [memory[i * size :][:size].view(dtype) for i in range(2 * count)]


def fill(flat: list[Tensor], roles: tuple[str, ...]) -> None:
    """Give each stretch values of its own."""
    period = 2**15 + 1
    for t, role in zip(flat, roles, strict=True):
        values = nonzero((period,), t.dtype)
        whole = t.numel() // period * period
        t[:whole].view(-1, period).copy_(values.abs() if role == "exp_avg_sqs" else values)
        t[whole:] = 1


def cut(flat: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of each stretch with gaps of one element, tensor i shifted by role + i elements."""
    for role, t in enumerate(flat):
        block = 64 // t.itemsize
        length = -(-bytes_of(len(flat)) // t.itemsize // SHIFTS // 64) * 64
        tensors = [t[role + i * (length + 1) :][:length] for i in range(SHIFTS)]
        start = SHIFTS * (length + 1)
        small = [t[start + role + 101 * i :][:n] for i, n in enumerate(SMALL)]
        assert {part.data_ptr() % 64 // t.itemsize for part in tensors} == {
            (role + i) % block for i in range(SHIFTS)
        }
        assert (len(flat) - 1) * sum(part.nbytes for part in tensors) >= cache_bytes()
        yield tensors + small


@pytest.mark.slow
@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("update", PAST_THE_CACHES, ids=str)
def test_past_the_caches_and_within_them(
    memory: Tensor, dtype: torch.dtype, isa: str, update: Update
) -> None:
    _core.set_isa(isa)
    flat = stretches(memory, update, dtype)
    large, small = flat[: len(update.lists)], flat[len(update.lists) :]
    fill(large, update.lists)
    for t, there in zip(large, small, strict=True):
        there.copy_(t)
    update(list(cut(large)))
    for i, alone in enumerate(zip(*cut(small), strict=True)):
        update([i * [t[:0]] + [t] for t in alone])  # a tensor's number has a part in random bits
    for a, b in zip(large, small, strict=True):
        assert torch.equal(bits(a), bits(b))
