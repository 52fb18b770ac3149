"""What the clock reads."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from benchmarks.contest import Contender, Phase, nothing
from benchmarks.timing import Lap, clock, interleave


def test_the_host_is_free_once_the_calls_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.02))
    lap = clock("wall", torch.device("cuda"))(partial(time.sleep, 0.01))
    assert lap.host >= 0.01
    assert lap.seconds >= lap.host + 0.02


def test_all_have_their_turn_to_be_first() -> None:
    order: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(name, (Phase(nothing, lambda: order.append(name)),) * 2, list)

    def tick(run: partial[None]) -> Lap:
        run()
        return Lap(2.0, 1.0)

    laps = interleave([contender("a"), contender("b")], tick, repeat=2)
    assert order[-8:] == [*"aabb", *"bbaa"]
    assert laps == {"a": [Lap(4.0, 2.0)] * 2, "b": [Lap(4.0, 2.0)] * 2}
