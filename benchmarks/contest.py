"""What a benchmark is made of: contenders that do the same work on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """Where a benchmark runs, and with which of the library's backends."""

    device: torch.device
    backend: str


@dataclass(frozen=True)
class Phase:
    """One timed stretch of a repetition, and what comes before it untimed."""

    prepare: Callable[[], object]
    run: Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One implementation of the work, with memory of its own.

    Attributes:
        name: as it is reported.
        phases: one repetition; its time is the sum of theirs.
        result: what the repetitions so far have led to, which all contenders must agree on.
    """

    name: str
    phases: tuple[Phase, ...]
    result: Callable[[], list[Tensor]]

    def repeat(self, times: int) -> None:
        """Do `times` repetitions, untimed."""
        for _ in range(times):
            for phase in self.phases:
                phase.prepare()
                phase.run()


@dataclass(frozen=True)
class Tolerance:
    """Results a, b agree where |a - b| <= atol + rtol |b|, elementwise."""

    rtol: float
    atol: float


# Peers round after each of up to three operations, we once: in a verification's three repetitions
# that is twelve roundings, of values of order one to ten.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    dtype: Tolerance(rtol=6 * torch.finfo(dtype).eps, atol=6 * torch.finfo(dtype).eps)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Yardstick:
    """Other work that is timed beside, and so never verified: what the machine can do just then.

    Attributes:
        contender: does that work.
        scale: how many times as long as it the library is meant to take.
    """

    contender: Contender
    scale: float = 1.0


@dataclass(frozen=True)
class Contest:
    """The library, its peers and the yardsticks of one benchmark.

    Attributes:
        library: ours.
        peers: what it is compared with; at least one, since they also verify it.
        yardsticks: what else is timed.
        tolerance: how closely results must agree.
        moved: bytes a repetition has to move, reads and writes; None where nobody can say.
        clock: "wall" for host and device together, "device" for the device alone; see `timing`.
        absent: a line for each peer that cannot take part.
    """

    library: Contender
    peers: tuple[Contender, ...]
    yardsticks: tuple[Yardstick, ...]
    tolerance: Tolerance
    moved: int | None = None
    clock: Literal["wall", "device"] = "wall"
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """The library is at least `ratio` times as fast as `against` (a peer or a yardstick)."""

    against: str
    ratio: float


@dataclass(frozen=True)
class Benchmark:
    """A named contest, built anew for every setting.

    Attributes:
        name: unique.
        summary: what is timed, in one line.
        build: makes the contest.
        goals: by device type.
    """

    name: str
    summary: str
    build: Callable[[Setting], Contest]
    goals: Mapping[str, tuple[Goal, ...]]


def nothing() -> None:
    """The preparation of a phase that needs none."""


def copy(elements: int, dtype: torch.dtype, device: torch.device, moved: int) -> Yardstick:
    """Return the yardstick "copy": `copy_` between two tensors of that many elements.

    It is scaled to `moved` bytes, so that a ratio to it is a fraction of its bandwidth.
    """
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    phase = Phase(nothing, lambda: target.copy_(source))
    copied = 2 * elements * dtype.itemsize
    return Yardstick(Contender("copy", (phase,), lambda: [target]), moved / copied)
