"""`eigenfilter bench host`: its table, and that nothing runs while it measures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from eigenfilter.benchmarks import host
from eigenfilter.experiments.cli import main


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing is compiled")
def test_every_call_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(host, "COUNTS", (2, 3))
    before = torch._foreach_add_
    assert main(["bench", "host", "--repeat", "2", "--out", str(tmp_path)]) == 0
    assert torch._foreach_add_ is before
    assert "| descend | 3 | torch.optim.SGD |" in capsys.readouterr().out
    (written,) = tmp_path.glob("*-cpu-host.json")
    costs = json.loads(written.read_text())["host"]
    ways = {(c["call"], c["by"]) for c in costs}
    calls = ("ascend", "descend", "descend_adamw")
    assert {by for _, by in ways} == {"triton", "torch.optim.SGD", "torch.optim.AdamW"}
    assert {(call, "triton") for call in calls} <= ways
    assert len(costs) == 2 * len(ways)
    assert all(c["us"]["low"] > 0 for c in costs)
