"""Replayed random numbers: a finite difference needs the same dropout masks twice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Randomness:
    """A snapshot of the states of torch's generators, on the CPU and on some GPUs."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._gpus = [d for d in devices if d.type == "cuda"]
        self._states = self._now()

    def replay(self) -> None:
        """Reset the generators to the snapshot."""
        cpu, *gpus = self._states
        torch.set_rng_state(cpu)
        for device, state in zip(self._gpus, gpus, strict=True):
            torch.cuda.set_rng_state(state, device)

    def has_changed(self) -> bool:
        """Whether numbers were drawn since the snapshot."""
        return not all(map(torch.equal, self._states, self._now()))

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._gpus)]
