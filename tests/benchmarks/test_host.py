"""`eigenfilter bench host`: its table, and that no kernel runs while it measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import host, native_stub
from benchmarks.environment import subprocess_environment
from eigenfilter.experiments.cli import main

CALLS = {"perturb", "sgd_step", "adamw_step", "norm", "SGD.step", "AdamW.step"}
EXTENSION = Path(__file__).parents[2] / native_stub.EXTENSION

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing is compiled")
needs_extension = pytest.mark.skipif(
    not EXTENSION.exists(), reason="needs the extension that make host-extension builds"
)


def read_costs(folder: Path) -> list[dict]:
    (file,) = folder.glob("*-cpu-host.json")
    costs: list[dict] = json.loads(file.read_text())["host"]
    return costs


@pytest.mark.slow
def test_every_call_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(host, "COUNTS", (2, 3))
    before = torch._foreach_add_, torch._fused_sgd_, torch.stack, torch.linalg.vector_norm
    out = tmp_path / "out"
    assert main(["bench", "host", "--only", "triton", "--repeat", "2", "--out", str(out)]) == 0
    after = torch._foreach_add_, torch._fused_sgd_, torch.stack, torch.linalg.vector_norm
    assert after == before
    assert "| `SGD.step` | 3 | torch foreach |" in capsys.readouterr().out
    costs = read_costs(out)
    ways = {(c["call"], c["by"]) for c in costs}
    assert {call for call, by in ways if by == "triton"} == CALLS
    assert {call for call, by in ways if by == "torch foreach"} == {
        "norm",
        "SGD.step",
        "AdamW.step",
    }
    assert {call for call, by in ways if by == "torch fused"} == {"SGD.step", "AdamW.step"}
    assert len(costs) == 2 * len(ways)
    assert all(c["us"]["low"] > 0 for c in costs)
    for c in costs:
        launches = 2 if c["call"] == "norm" else 1
        assert c["launches"] == (launches if c["by"] == "triton" else None)
        compared = "torch foreach" in {by for call, by in ways if call == c["call"]}
        assert (c["ratio"] is not None) == (compared and c["by"] != "torch foreach")


@needs_extension
@pytest.mark.slow
def test_native_launches_are_counted_and_run_nothing(tmp_path: Path) -> None:
    command = ["bench", "host", "--only", "native", "--repeat", "2", "--out", str(tmp_path)]
    assert main([*command, "--extension", str(EXTENSION)]) == 0
    launches = {
        (c["call"], c["tensors"]): (c["launches"], c["argument_bytes"])
        for c in read_costs(tmp_path)
        if c["by"] == "native"
    }
    assert {call for call, _ in launches} == CALLS
    for call in CALLS:
        few, few_bytes = launches[call, 4]
        many, many_bytes = launches[call, 2000]
        assert few == (2 if call == "norm" else 1)
        assert few_bytes <= 4096  # the small batch
        assert few <= many <= 3
        assert many_bytes > 2000 * 3 * 8 or call == "norm"
        assert many_bytes <= many * 32764


@needs_extension
def test_no_kernel_runs() -> None:
    """The launches are counted, and the tensors do not change."""
    code = f"""
import runpy
runpy.run_path({native_stub.__file__!r})["load"]({str(EXTENSION)!r})
import torch
from eigenfilter import kernels
from benchmarks import native_stub
assert native_stub.is_loaded()
x, g, b = ([torch.full((n,), 2.0) for n in (3, 5)] for _ in range(3))
before = native_stub.counts()
kernels.perturb(x, g, b, 0.5)
assert native_stub.counts()[0] == before[0] + 1
assert all((t == 2).all() for t in x + b)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=subprocess_environment())


def test_the_installed_extension_is_not_the_stub() -> None:
    assert not native_stub.is_loaded()
