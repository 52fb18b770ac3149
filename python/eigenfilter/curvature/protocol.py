"""The protocol by which solvers see an operator."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Slices(Protocol):
    """How vectors [n] are divided among processes, which hold one slice [l] each; l may be 0."""

    @property
    def length(self) -> int:
        """The length l of this process's slice."""

    @property
    def number(self) -> int:
        """The number of this process's slice, from 0."""

    @property
    def count(self) -> int:
        """The number of slices."""

    def sum(self, t: Tensor) -> Tensor:
        """Sum t over the slices in place, to the same bits in every process, and return it."""


class SymmetricOperator(Protocol):
    """A symmetric matrix H [n, n], as a linear map. It must not write to v or V.

    If the operator has a context manager `fixed()`, solvers enter it while they work. If it has an
    attribute `slices` that is not None, a `Slices`, then the vectors that it takes and returns are
    slices, and all processes that hold one must call it at the same time with the same arguments.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors taken and returned."""

    @property
    def device(self) -> torch.device:
        """The device of the vectors taken and returned."""

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] for v [n]."""

    def matmat(self, V: Tensor) -> Tensor:
        """Return H V [n, b] for V [n, b]. Solvers use it only for blocks of two or more."""
