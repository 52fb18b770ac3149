"""The one table of cases: sizes, dtypes, hyperparameters, and tensors that notice stray writes.

Hyperparameters are never at their defaults and gradients never zero, so that nothing a kernel
forgets goes unnoticed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Below, at and above the SIMD widths (2 to 16 elements and blocks of them), a thread's least share
# (64 KiB) and the chunk of a sum (16 Ki elements).
SIZES = (0, 1, 3, 15, 16, 17, 63, 64, 65, 1000, 16383, 16385, 70001)

LR = 0.313
MOMENTUM = 0.87
DAMPENING = 0.31
WEIGHT_DECAY = 0.073
ALPHA = -0.137
RHO = 0.137
SCALE = 3.3  # no power of two: dividing by it rounds, and multiplying by 1 / it rounds otherwise

MARGIN = 32  # elements before and after every tensor of an Arena

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Room:
    """An implementation of the kernels, where it runs and, on the CPU, its instruction set."""

    backend: str
    device: str = "cpu"
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa or self.device}"


@dataclass(frozen=True)
class Descent:
    """Which lists and options a call of `descend` is given."""

    momentum: str  # "none", "heavy" or "nesterov"
    backups: bool
    decay: bool
    maximize: bool

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `kernels.descend`."""
        with_momentum = self.momentum != "none"
        return {
            "lr": LR,
            "momentum": MOMENTUM if with_momentum else 0.0,
            "dampening": DAMPENING if self.momentum == "heavy" else 0.0,
            "weight_decay": WEIGHT_DECAY if self.decay else 0.0,
            "nesterov": self.momentum == "nesterov",
            "maximize": self.maximize,
        }

    def __str__(self) -> str:
        names = ("backups", "decay", "maximize")
        return "-".join([self.momentum, *(name for name in names if getattr(self, name))])


DESCENTS = [
    Descent(*choice)
    for choice in itertools.product(
        ("none", "heavy", "nesterov"), (False, True), (False, True), (False, True)
    )
]


class Arena:
    """Lists of tensors of equal sizes, NaN at first, in memory with margins of NaN between them.

    Args:
        dtype, device: of all tensors.
        lists: how many lists.
        sizes: elements of the tensors of every list.
        shifts: by how many elements each list's tensors miss 64-byte alignment.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        lists: int,
        sizes: Sequence[int] = SIZES,
        device: str = "cpu",
        shifts: Sequence[int] | None = None,
    ) -> None:
        self.memory = []
        self.lists = []
        self._inside = []
        for shift in shifts or [0] * lists:
            spans, inside = _layout(tuple(sizes), shift)
            memory = torch.full((inside.numel(),), torch.nan, dtype=dtype, device=device)
            self.memory.append(memory)
            self.lists.append([memory[first:last] for first, last in spans])
            self._inside.append(inside.to(device))

    def fill(self, *indices: int) -> None:
        """Give the lists at `indices` random values that are not zero."""
        for i in indices:
            memory = self.memory[i]
            values = nonzero(memory.shape, memory.dtype).to(memory.device)
            torch.where(self._inside[i], values, memory, out=memory)

    def values(self, i: int) -> Tensor:
        """All elements of list `i`, a copy."""
        return torch.cat(self.lists[i])

    def check_margins(self) -> None:
        """Fail if anything was written outside of the tensors."""
        for i, (memory, inside) in enumerate(zip(self.memory, self._inside, strict=True)):
            assert (memory.isnan() | inside).all(), f"written outside of list {i}"


@functools.cache
def _layout(sizes: tuple[int, ...], shift: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Where each tensor begins and ends in an arena's memory, and which elements are in one."""
    spans, end = [], MARGIN
    for size in sizes:
        spans.append((end + shift, end + shift + size))
        end += -(-(size + 2 * MARGIN) // MARGIN) * MARGIN
    inside = torch.zeros(end, dtype=torch.bool)
    for first, last in spans:
        inside[first:last] = True
    return spans, inside


def nonzero(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random values of both signs, between 0.5 and 2 in size."""
    t = torch.empty(tuple(shape), dtype=torch.float64).uniform_(-1.5, 1.5)
    return (t + t.sign() * 0.5).to(dtype)


def bits(t: Tensor) -> Tensor:
    """The tensor's elements as integers: equal where all bits are, NaN or not."""
    return t.detach().contiguous().view(_BITS[t.element_size()])


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree in dtype and bit for bit."""
    return actual.dtype == expected.dtype and torch.equal(bits(actual), bits(expected))
