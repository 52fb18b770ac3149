"""Time contenders in turns: A B C, B C A, C A B, ..., so that a disturbance affects all of them."""

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

from benchmarks.comparison import Contender


class Timing(NamedTuple):
    """The time that a call took.

    Attributes:
        seconds: the whole time, or the device's alone; the clock says which.
        host: seconds until the call returned, without waiting for the device. A CPU does the work
            within the call, so there it is the whole time.
    """

    seconds: float
    host: float


Clock = Callable[[Callable[[], object]], Timing]
"""Calls a function and returns the time that it took."""

WARM_UP = 3
MIN_ROUNDS, MAX_ROUNDS = 15, 200  # between them, the budget decides
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

    "wall" waits for the device before and after the call. "device" takes the time between two
    events on the device's stream. Before them it queues work that empties the caches and gives the
    host a head start, so that the device never waits for the host. On a CPU the two are the same.
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
) -> dict[str, list[Timing]]:
    """Return the timings of every repetition, by contender; the i-th ones belong to one round.

    Args:
        contenders: the contenders to time, after a few rounds of warm-up.
        clock: the clock; see the function `clock`.
        repeat: rounds; None for as many as the budget allows, from MIN_ROUNDS to MAX_ROUNDS.
        budget: seconds for all rounds, preparations included.
    """
    with _without_gc():
        start = time.perf_counter()
        for contender in contenders:
            for _ in range(WARM_UP):
                _time_once(contender, clock)
        round_seconds = (time.perf_counter() - start) / WARM_UP
        rounds = repeat or min(max(int(budget / round_seconds), MIN_ROUNDS), MAX_ROUNDS)
        return time_in_turns(contenders, clock, rounds)


def time_in_turns(
    contenders: Sequence[Contender], clock: Clock, rounds: int
) -> dict[str, list[Timing]]:
    """Time all contenders in every round, beginning with another one each time; no warm-up."""
    timings: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
    for i in range(rounds):
        first = i % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            timings[contender.name].append(_time_once(contender, clock))
    return timings


def _time_once(contender: Contender, clock: Clock) -> Timing:
    timings = []
    for phase in contender.phases:
        phase.prepare()
        timings.append(clock(phase.run))
    return Timing(sum(timing.seconds for timing in timings), sum(timing.host for timing in timings))


def _wall(synchronize: Callable[[], None]) -> Clock:
    def measure(run: Callable[[], object]) -> Timing:
        synchronize()
        start = time.perf_counter()
        run()
        host_end = time.perf_counter()
        synchronize()
        return Timing(time.perf_counter() - start, host_end - start)

    return measure


def _device(device: torch.device) -> Clock:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    event = functools.partial(torch.cuda.Event, enable_timing=True)

    def measure(run: Callable[[], object]) -> Timing:
        start, end = event(), event()
        flush.zero_()
        start.record()
        host_start = time.perf_counter()
        run()
        host_end = time.perf_counter()
        end.record()
        end.synchronize()
        return Timing(float(start.elapsed_time(end)) / 1e3, host_end - host_start)

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
