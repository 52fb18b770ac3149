"""Random numbers drawn again: finite differences need the same dropout masks on both sides."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Randomness:
    """The states of torch's generators, on the CPU and on some GPUs, at one moment."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._gpus = [d for d in devices if d.type == "cuda"]
        self._states = self._now()

    def replay(self) -> None:
        """Let the generators go on from that moment."""
        cpu, *gpus = self._states
        torch.set_rng_state(cpu)
        for device, state in zip(self._gpus, gpus, strict=True):
            torch.cuda.set_rng_state(state, device)

    def has_changed(self) -> bool:
        """Whether numbers were drawn since."""
        return not all(map(torch.equal, self._states, self._now()))

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._gpus)]
