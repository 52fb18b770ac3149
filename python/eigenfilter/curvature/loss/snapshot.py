"""The point x at which something was computed, and whether a model is still there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ParamSnapshot:
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
            and torch.equal(_sums(model), self._sums)
        )


def checksum(tensors: Sequence[Tensor]) -> float:
    """Return a number that is the same for the same tensors, and hardly for others."""
    return float(int(_sums(tensors).sum()) % 2**52)


def _mark(t: Tensor) -> tuple[int, torch.dtype, torch.device]:
    return t._version, t.dtype, t.device


@torch.no_grad()
def _sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of each tensor's bits, read as whole numbers: no rounding hides a change.

    A sum of the values would miss gradients that sum to zero, as cross-entropy's do over classes.
    """
    sums = []
    for t in tensors:
        real = torch.view_as_real(t) if t.is_complex() else t
        bits = real.view(_WHOLE[real.itemsize])
        sums.append(bits.sum(dtype=torch.int64).to(tensors[0].device))
    return torch.stack(sums)
