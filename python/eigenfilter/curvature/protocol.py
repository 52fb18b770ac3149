"""What a solver sees of the thing it solves."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class SymmetricOperator(Protocol):
    """What a solver needs of a symmetric H [n, n]. It must not write to v or V.

    If the operator has a context manager `fixed()`, solvers hold it while they work.
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
