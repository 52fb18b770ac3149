"""Replayed random numbers: a finite difference needs the same dropout masks twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from eigenfilter import _callers


class Randomness:
    """A snapshot of the states of torch's generators, on the CPU and on the parameters' GPUs."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._gpus = [device for device in {p.device for p in params} if device.type == "cuda"]
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


class Replay:
    """Gives both evaluations of a finite difference the same random numbers, or warns."""

    def __init__(self) -> None:
        self._before: Randomness | None = None  # the first evaluation
        self._after_ascent: Randomness | None = None  # whose evaluation should be a replay
        self._has_replayed = False

    def begin_evaluation(self, index: int, params: Iterable[Tensor]) -> None:
        """Record the random numbers of the first evaluation, and replay them in the second."""
        if index == 0:
            self._before = Randomness(params)
        elif self._before is not None:
            self._before.replay()
            self._has_replayed = True

    def end_ascent(self, params: Iterable[Tensor]) -> None:
        """Record the generators after the ascent between the two evaluations."""
        if not self._has_replayed:
            self._after_ascent = Randomness(params)

    def warn_of_others(self) -> None:
        """Warn if the second evaluation drew other random numbers."""
        check = self._after_ascent
        if check is not None and not self._has_replayed and check.has_changed():
            warnings.warn(
                "the two sides of a finite difference saw different random numbers (dropout, "
                "augmentation): call the closure inside `with opt.evaluation():`",
                stacklevel=_callers.stacklevel(),
            )
