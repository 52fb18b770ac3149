"""The point x at which something was computed, and whether a model is still there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Point:
    """A record of tensors as they are now: which they are, their versions, and their sums."""

    def __init__(self, model: Sequence[Tensor], data: Sequence[Tensor]) -> None:
        """Record parameters and buffers `model`, and the tensors of the data."""
        self._tensors = [*model, *data]
        self._marks = [_mark(t) for t in self._tensors]
        self._sums = _sums(model)

    def unmarked(self) -> bool:
        """Whether the recorded tensors are unchanged as far as their versions tell."""
        return all(_mark(t) == mark for t, mark in zip(self._tensors, self._marks, strict=True))

    def holds(self, model: Sequence[Tensor], data: Sequence[Tensor]) -> bool:
        """Whether these are the recorded tensors, with the same versions and sums.

        The sums tell where torch's fused optimizers, batch normalisation or a write through `.data`
        changed a tensor without giving it a new version. They cost one pass over `model` and one
        synchronisation with its device.
        """
        tensors = [*model, *data]
        return (
            len(tensors) == len(self._tensors)
            and all(t is seen for t, seen in zip(tensors, self._tensors, strict=True))
            and self.unmarked()
            and torch.allclose(_sums(model), self._sums, 0.0, 0.0, equal_nan=True)
        )


def checksum(tensors: Sequence[Tensor]) -> float:
    """Return a number that is the same for the same tensors, and hardly for others."""
    return float(_sums(tensors).sum())


def _mark(t: Tensor) -> tuple[int, torch.dtype, torch.device]:
    return t._version, t.dtype, t.device


@torch.no_grad()
def _sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of each tensor, at float32 or better: one ulp in one element shows in it."""
    sums = []
    for t in tensors:
        real = torch.view_as_real(t) if t.is_complex() else t
        total = real.sum(dtype=torch.promote_types(real.dtype, torch.float32))
        sums.append(total.to(tensors[0].device, torch.float64))
    return torch.stack(sums)
