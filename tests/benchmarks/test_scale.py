"""The memory of eigsh is as predicted, measured as `eigenfilter bench scale` does."""

from __future__ import annotations

import sys

import pytest

from benchmarks import scale


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' high-water mark")
def test_memory() -> None:
    row = scale.measure_in_new_process(3_000_000)
    assert row["memory"] == pytest.approx(row["predicted_memory"], rel=0.05)
    assert row["traffic"] > row["memory"]
    assert scale.line(row).count("|") == len(scale.COLUMNS) + 1
