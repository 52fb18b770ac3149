"""A snapshot of parameters, buffers and data, to notice whether they have changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ParamSnapshot:
    """A record of tensors: their identities, version counters and sums, not their values."""

    def __init__(self, model: Sequence[Tensor], data: Sequence[Tensor]) -> None:
        """Record the parameters and buffers `model`, and the tensors of the data."""
        self._tensors = [*model, *data]
        self._marks = [_mark(t) for t in self._tensors]
        self._sums = _sums(model)

    def same_versions(self) -> bool:
        """Whether the recorded tensors are unchanged, as far as their version counters tell."""
        return all(_mark(t) == mark for t, mark in zip(self._tensors, self._marks, strict=True))

    def matches(self, model: Sequence[Tensor], data: Sequence[Tensor]) -> bool:
        """Whether these are the recorded tensors, with the same versions and sums.

        Sums show a change by torch's fused optimizers, by batch normalization or through `.data`,
        which leave the version counter as it is. They cost one pass over `model` and one
        synchronization with its device.
        """
        tensors = [*model, *data]
        return (
            len(tensors) == len(self._tensors)
            and all(t is recorded for t, recorded in zip(tensors, self._tensors, strict=True))
            and self.same_versions()
            and torch.equal(_sums(model), self._sums)
        )


def checksum(tensors: Sequence[Tensor]) -> float:
    """Return a number that is equal for equal tensors, and very unlikely for others."""
    return float(int(_sums(tensors).sum()) % 2**52)


def _mark(t: Tensor) -> tuple[int, torch.dtype, torch.device]:
    return t._version, t.dtype, t.device


@torch.no_grad()
def _sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of each tensor's bit patterns as integers, so that no rounding hides a change.

    A sum of the values would miss updates that sum to zero, as cross-entropy's do over classes.
    """
    sums = []
    for t in tensors:
        real = torch.view_as_real(t) if t.is_complex() else t
        bits = real.view(_INTEGERS[real.itemsize])
        sums.append(bits.sum(dtype=torch.int64).to(tensors[0].device))
    return torch.stack(sums)
