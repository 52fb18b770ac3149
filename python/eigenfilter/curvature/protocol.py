"""What a solver sees of the thing it solves."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Slices(Protocol):
    """How vectors [n] are cut among processes, each of which holds one slice [l]; l may be 0."""

    @property
    def length(self) -> int:
        """l, of the slice held here."""

    @property
    def number(self) -> int:
        """The number of the slice held here, from 0."""

    @property
    def count(self) -> int:
        """How many slices there are."""

    def sum(self, t: Tensor) -> Tensor:
        """Add t up over the slices, in place and everywhere to the same bits, and return it."""


class SymmetricOperator(Protocol):
    """What a solver needs of a symmetric H [n, n]. It must not write to v or V.

    If the operator has a context manager `fixed()`, solvers hold it while they work. If it has an
    attribute `slices` that is not None, a `Slices`, then the vectors that it takes and gives are
    slices, and all processes that hold one must do the same at the same time.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors taken and given."""

    @property
    def device(self) -> torch.device:
        """Of the vectors taken and given."""

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] for v [n]."""

    def matmat(self, V: Tensor) -> Tensor:
        """Return H V [n, b] for V [n, b]. Only blocks of two or more ask for it."""
