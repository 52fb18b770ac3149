"""The one table of cases: sizes, dtypes, hyperparameters, and tensors that notice stray writes.

Hyperparameters are never at their defaults and gradients never zero, so that nothing a kernel
forgets goes unnoticed.
"""

from __future__ import annotations

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
SCALE = 3.7  # no power of two: dividing by it rounds

MARGIN = 32  # elements before and after every tensor of an Arena

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    """Lists of tensors of equal sizes, NaN at first, each in memory with a margin of NaN around it.

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
        shifts = [0] * lists if shifts is None else shifts
        self._memory = [
            [
                torch.full((size + 2 * MARGIN + 64,), torch.nan, dtype=dtype, device=device)
                for size in sizes
            ]
            for _ in range(lists)
        ]
        self._spans = [
            [(MARGIN + shift, MARGIN + shift + size) for size in sizes] for shift in shifts
        ]
        self.lists = [
            [memory[a:b] for memory, (a, b) in zip(memories, spans, strict=True)]
            for memories, spans in zip(self._memory, self._spans, strict=True)
        ]

    def fill(self, *indices: int) -> None:
        """Give the lists at `indices` random values that are not zero."""
        for i in indices:
            for t in self.lists[i]:
                t.copy_(nonzero(t.shape, t.dtype))

    def copy(self) -> list[list[Tensor]]:
        """Clones of all lists."""
        return [[t.clone() for t in tensors] for tensors in self.lists]

    def check_margins(self) -> None:
        """Fail if anything was written outside of the tensors."""
        for memories, spans in zip(self._memory, self._spans, strict=True):
            for memory, (first, last) in zip(memories, spans, strict=True):
                assert memory[:first].isnan().all(), "written before the tensor"
                assert memory[last:].isnan().all(), "written past the tensor"


def nonzero(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random values of both signs, between 0.5 and 2 in size."""
    size = torch.empty(tuple(shape), dtype=torch.float64).uniform_(0.5, 2.0)
    return (size * torch.randn(tuple(shape)).sign()).to(dtype)


def bits(t: Tensor) -> Tensor:
    """The tensor's memory as integers: equal where all bits are, NaN or not."""
    return t.detach().contiguous().view(_BITS[t.element_size()])


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit."""
    return len(actual) == len(expected) and all(
        a.dtype == e.dtype and torch.equal(bits(a), bits(e))
        for a, e in zip(actual, expected, strict=True)
    )
