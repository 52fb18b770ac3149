"""`eigenfilter bench`: its tables, and one clear line and exit code 2 on bad input."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import finite_differences, memory, monitor
from eigenfilter.experiments.cli import main


@pytest.mark.parametrize(
    "table",
    [[], ["memory"], ["finite-differences"], ["curvature"], ["monitor"], ["host"], ["page"]],
    ids=" ".join,
)
def test_help(table: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", *table, "--help"])
    assert "out/bench" in capsys.readouterr().out


def test_patterns_select(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--only", "usam-*", "--only", "norm-float32"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    models = ("resnet18", "resnet50", "vit", "gpt2", "small", "large")
    assert names == [*(f"usam-{model}" for model in models), "norm-float32"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "no-such"], "no benchmark 'no-such' (see eigenfilter bench --list)"),
        (["--only", "sgd-small", "memory"], "--only does not go with memory"),
        (["--repeat", "2", "page", "x.json"], "--repeat does not go with page"),
        (["monitor", "--only", "LSTM"], "no network 'LSTM': choose from tanh MLP, GELU conv, GPT"),
        (["--device", "cpu", "host"], "--device does not go with host"),
        (["host", "--only", "cuda"], "no launches of 'cuda': choose from native, triton"),
        (
            ["host", "--extension", "no.so"],
            "no.so is not there: run make bench-host, which builds it, or give --only triton to "
            "leave the native launches out",
        ),
        (["--device", "cpu", "monitor"], "--device does not go with monitor"),
        (["--device", "cpu", "finite-differences"], "--device does not go with finite-differences"),
    ],
)
def test_bad_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    assert capsys.readouterr().err == f"eigenfilter bench: error: {message}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeat", "0"], "--repeat: must be a whole number from 1"),
        (["memory", "--elements", "7"], "--elements: must be a whole number from 8"),
        (["no-such"], "invalid choice: 'no-such'"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *argv])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda", "memory"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("before", [True, False], ids=["before the table", "after it"])
def test_memory_writes_its_results(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        memory, "measure_in_new_process", lambda name, elements, device: elements / 2
    )
    out = ["--out", str(tmp_path)]
    argv = [*out, "memory"] if before else ["memory", *out]
    assert main(["bench", *argv, "--elements", "24"]) == 0
    (data,), (table,) = tmp_path.glob("*-cpu-memory.json"), tmp_path.glob("*-cpu-memory.md")
    results = json.loads(data.read_text())
    assert results["memory"] == dict.fromkeys(memory.OPTIMIZERS, 12.0)
    assert results["elements"] == 24
    assert "| USAM | 12.0 |" in table.read_text().splitlines()


def test_finite_differences_write_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        finite_differences, "NETWORKS", {"tanh MLP": finite_differences.NETWORKS["tanh MLP"]}
    )
    monkeypatch.setattr(finite_differences, "TRAINING", 1)
    assert main(["bench", "finite-differences", "--out", str(tmp_path)]) == 0
    (data,) = tmp_path.glob("*-cpu-finite-differences.json")
    results = json.loads(data.read_text())
    best = {(m["point"], m["precision"]): min(m["errors"]) for m in results["finite_differences"]}
    assert len(best) == 6
    assert best[("initial", "float64")] < 1e-4
    assert best[("initial", "float32")] < 1e-2


def test_the_monitors_cost_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(monitor.TRAININGS["tanh MLP"], every=(5, 10))
    monkeypatch.setattr(monitor, "TRAININGS", {"tanh MLP": config})
    monkeypatch.setattr(monitor, "STEPS", 20)
    assert main(["bench", "monitor", "--repeat", "2", "--out", str(tmp_path)]) == 0
    (data,) = tmp_path.glob("*-cpu-monitor.json")
    costs = json.loads(data.read_text())["monitor"]
    expected = [(every, tol) for every in (5, 10) for tol in monitor.TOLERANCES]
    assert [(cost["every"], cost["tol"]) for cost in costs] == expected
    for cost in costs:
        share = cost["share"]
        assert 0 < share["low"] <= share["median"] <= share["high"]
        assert cost["check_ms"] > 0
        assert cost["step_ms"] > 0
        assert cost["matvecs"] >= 1


def test_finite_differences_need_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["bench", "finite-differences"]) == 2
    assert "sklearn is not installed" in capsys.readouterr().err
