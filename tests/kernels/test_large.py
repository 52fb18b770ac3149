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

from cases import ALPHA, DESCENTS, bits, nonzero
from eigenfilter import _core, kernels

SHIFTS = 18  # tensors in a list, each by one more element off alignment, and as many small ones
SMALL = (0, 1, 5, 15, 31, 70)
CAPACITY = 448 * 2**20  # of a cache that these tests can exceed in less than 2 GiB
_SC_LEVEL3_CACHE_SIZE = 194  # glibc's

Lists = list[list[Tensor]]


def cache_bytes() -> int:
    """The last-level cache as the kernels see it: 32 MiB where the system does not say."""
    try:
        size = os.sysconf(_SC_LEVEL3_CACHE_SIZE)
    except (OSError, ValueError):
        size = 0
    return size if size > 0 else 32 * 2**20


@pytest.fixture(scope="module")
def memory() -> Iterator[list[Tensor]]:
    """Eight stretches of memory, of which two exceed the cache; touched once for all tests."""
    if cache_bytes() > CAPACITY:
        pytest.skip(f"needs 4 times the cache in memory, and that has {cache_bytes()} bytes")
    size = cache_bytes() // 2 + 2**18
    return [torch.zeros(size, dtype=torch.uint8) for _ in range(8)]


def fill(stretches: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The stretches as elements of `dtype`, each with values of its own."""
    flat = [stretch.view(dtype) for stretch in stretches]
    period = 2**15 + 1
    for t in flat:
        whole = t.numel() // period * period
        t[:whole].view(-1, period).copy_(nonzero((period,), dtype))
        t[whole:] = 1
    return flat


def cut(flat: Tensor, role: int) -> list[Tensor]:
    """Tensors of a stretch with gaps of one element, tensor i shifted by role + i elements."""
    room = cache_bytes() // 2 // flat.itemsize
    length = -(-room // SHIFTS // 64) * 64
    tensors = [flat[role + i * (length + 1) :][:length] for i in range(SHIFTS)]
    start = SHIFTS * (length + 1)
    small = [flat[start + role + 101 * i :][:n] for i, n in enumerate(SMALL)]
    assert {t.data_ptr() % 64 // t.itemsize for t in tensors} == set(range(64 // flat.itemsize)) & {
        (role + i) % (64 // flat.itemsize) for i in range(SHIFTS)
    }
    assert 2 * sum(t.nbytes for t in tensors) >= cache_bytes()
    return tensors + small


def ascend(x: list[Tensor], g: list[Tensor], m: list[Tensor], b: list[Tensor]) -> None:
    kernels.ascend(x, g, b, ALPHA)


def descend(x: list[Tensor], g: list[Tensor], m: list[Tensor], b: list[Tensor]) -> None:
    case = next(c for c in DESCENTS if c.momentum == "none" and c.backups and c.decay)
    kernels.descend(x, g, None, b, **case.options())


def descend_with_momentum(
    x: list[Tensor], g: list[Tensor], m: list[Tensor], b: list[Tensor]
) -> None:
    case = next(c for c in DESCENTS if c.momentum == "nesterov" and c.backups and c.decay)
    kernels.descend(x, g, m, b, **case.options())


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("call", [ascend, descend, descend_with_momentum])
def test_past_the_caches_and_within_them(
    memory: list[Tensor], dtype: torch.dtype, isa: str, call: object
) -> None:
    _core.set_isa(isa)
    large = fill(memory[:4], dtype)
    small = [there.view(dtype).copy_(t) for t, there in zip(large, memory[4:], strict=True)]
    call(*(cut(t, role) for role, t in enumerate(large)))
    for alone in zip(*(cut(t, role) for role, t in enumerate(small)), strict=True):
        call(*([t] for t in alone))
    for a, b in zip(large, small, strict=True):
        assert torch.equal(bits(a), bits(b))
