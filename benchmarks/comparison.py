"""What a benchmark is made of: contenders that do the same work on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """The device that a benchmark runs on, and the library's backend."""

    device: torch.device
    backend: str


@dataclass(frozen=True)
class Phase:
    """One timed stretch of a repetition: `run` is timed, `prepare` runs before it untimed."""

    prepare: Callable[[], object]
    run: Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One implementation of the work, with memory of its own.

    Attributes:
        name: the name in reports.
        phases: one repetition; its time is the sum of theirs.
        result: returns the state after the repetitions so far. All contenders must agree on it.
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


# Peers round after each of up to three operations, the library rounds once. A verification does
# three repetitions, which makes twelve roundings, of values of order one to ten.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    dtype: Tolerance(rtol=6 * torch.finfo(dtype).eps, atol=6 * torch.finfo(dtype).eps)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Reference:
    """Other work, timed beside the library to show what the machine can do at that moment.

    It computes something else, so it is never verified.

    Attributes:
        contender: does that work.
        scale: how many times as long as this work the library is meant to take.
    """

    contender: Contender
    scale: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """The library, its peers and the references of one benchmark.

    Attributes:
        library: the library's contender.
        peers: what the library is compared with. There is at least one, since peers also verify
            the library's results.
        references: other work that is timed beside them.
        tolerance: how closely the results must agree.
        traffic: bytes that a repetition has to read and write; None where that is unknown.
        clock: "wall" for host and device together, "device" for the device alone; see
            `timing.clock`.
        absent: one line for each peer that cannot take part.
    """

    library: Contender
    peers: tuple[Contender, ...]
    references: tuple[Reference, ...]
    tolerance: Tolerance
    traffic: int | None = None
    clock: Literal["wall", "device"] = "wall"
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """The library is at least `ratio` times as fast as `against`, a peer or a reference."""

    against: str
    ratio: float


@dataclass(frozen=True)
class Benchmark:
    """A named comparison, which is built again for every setting.

    Attributes:
        name: unique among all benchmarks.
        summary: what is timed, in one line.
        build: makes the comparison.
        goals: the goals by device type.
    """

    name: str
    summary: str
    build: Callable[[Setting], Comparison]
    goals: Mapping[str, tuple[Goal, ...]]


def do_nothing() -> None:
    """The preparation of a phase that needs none."""


def copy_reference(
    elements: int, dtype: torch.dtype, device: torch.device, traffic: int
) -> Reference:
    """Return the reference "copy": `copy_` between two tensors of that many elements.

    It is scaled to `traffic` bytes, so a ratio to it is a fraction of the copy's bandwidth.
    """
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    phase = Phase(do_nothing, lambda: target.copy_(source))
    copy_traffic = 2 * elements * dtype.itemsize
    return Reference(Contender("copy", (phase,), lambda: [target]), traffic / copy_traffic)
