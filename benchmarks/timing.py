"""Time contenders in turns: A B C, B C A, C A B, ..., so that what disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from benchmarks.contest import Contender


class Lap(NamedTuple):
    """Seconds that something took.

    Attributes:
        seconds: all told, or of the device alone, as the clock has it.
        host: until the calls returned, whatever the device still had to do. A CPU does the work
            within the calls, so that there it is the whole time.
    """

    seconds: float
    host: float


Clock = Callable[[Callable[[], object]], Lap]
"""Runs something and returns what it took."""

WARM_UP = 3
LEAST, MOST = 15, 200  # rounds, within which the budget decides
FLUSH_BYTES = 1 << 30


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of a sample."""
        low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
        return cls(low, median, high)


def clock(kind: Literal["wall", "device"], device: torch.device) -> Clock:
    """Return a clock for work on a device.

    "wall" waits for the device before and after. "device" is the time between two events on its
    stream; work queued before them, which also empties its caches, gives the host a head start, so
    that the device never waits for the host. On a CPU the two are one.
    """
    if device.type == "cpu":
        return _wall(lambda: None)
    if kind == "wall":
        return _wall(lambda: torch.cuda.synchronize(device))
    return _device(device)


def interleave(
    contenders: Sequence[Contender],
    clock: Clock,
    *,
    repeat: int | None = None,
    budget: float = 5.0,
) -> dict[str, list[Lap]]:
    """Return every repetition's lap, by contender; the i-th of all belong to one round.

    Args:
        contenders: what to time, after a few rounds of warm-up.
        clock: see `clock`.
        repeat: rounds; None for as many as the budget allows, within limits.
        budget: seconds, preparations included.
    """
    with _without_gc():
        began = time.perf_counter()
        for contender in contenders:
            for _ in range(WARM_UP):
                _once(contender, clock)
        a_round = (time.perf_counter() - began) / WARM_UP
        rounds = repeat or min(max(int(budget / a_round), LEAST), MOST)
        return turns(contenders, clock, rounds)


def turns(contenders: Sequence[Contender], clock: Clock, rounds: int) -> dict[str, list[Lap]]:
    """Return what `interleave` does, without warm-up."""
    laps: dict[str, list[Lap]] = {contender.name: [] for contender in contenders}
    for i in range(rounds):
        first = i % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            laps[contender.name].append(_once(contender, clock))
    return laps


def _once(contender: Contender, clock: Clock) -> Lap:
    laps = []
    for phase in contender.phases:
        phase.prepare()
        laps.append(clock(phase.run))
    return Lap(sum(lap.seconds for lap in laps), sum(lap.host for lap in laps))


def _wall(synchronize: Callable[[], None]) -> Clock:
    def measure(run: Callable[[], object]) -> Lap:
        synchronize()
        began = time.perf_counter()
        run()
        returned = time.perf_counter()
        synchronize()
        return Lap(time.perf_counter() - began, returned - began)

    return measure


def _device(device: torch.device) -> Clock:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    event = functools.partial(torch.cuda.Event, enable_timing=True)

    def measure(run: Callable[[], object]) -> Lap:
        began, ended = event(), event()
        flush.zero_()
        began.record()
        called = time.perf_counter()
        run()
        returned = time.perf_counter()
        ended.record()
        ended.synchronize()
        return Lap(float(began.elapsed_time(ended)) / 1e3, returned - called)

    return measure


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
