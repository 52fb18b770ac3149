"""Clocks, and the order of the contenders."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from benchmarks.comparison import Contender, Phase, do_nothing
from benchmarks.timing import Timing, clock, interleave


def test_host_time_ends_when_the_calls_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.02))
    timing = clock("wall", torch.device("cuda"))(partial(time.sleep, 0.01))
    assert timing.host >= 0.01
    assert timing.seconds >= timing.host + 0.02


def test_each_contender_is_first_in_turn() -> None:
    order: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(name, (Phase(do_nothing, lambda: order.append(name)),) * 2, list)

    def tick(run: partial[None]) -> Timing:
        run()
        return Timing(2.0, 1.0)

    timings = interleave([contender("a"), contender("b")], tick, repeat=2)
    assert order[-8:] == [*"aabb", *"bbaa"]
    assert timings == {"a": [Timing(4.0, 2.0)] * 2, "b": [Timing(4.0, 2.0)] * 2}
