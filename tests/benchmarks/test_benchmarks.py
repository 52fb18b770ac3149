"""The benchmarks: all of them are there, wrong results are not timed, and results are written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import registry, report, shapes, training
from benchmarks.comparison import (
    TOLERANCES,
    Benchmark,
    Comparison,
    Contender,
    Goal,
    Phase,
    copy_reference,
    do_nothing,
)
from benchmarks.timing import Spread
from benchmarks.verify import distance
from eigenfilter.experiments.cli import main

TOLERANCE = TOLERANCES[torch.float32]


def doubling(peer: Callable[[Tensor], object]) -> Benchmark:
    """A benchmark whose library doubles a tensor, and whose peer runs a function on one."""

    def contender(name: str, work: Callable[[Tensor], object]) -> Contender:
        t = torch.ones(8)
        return Contender(name, (Phase(do_nothing, lambda: work(t)),), lambda: [t])

    def build(setting: object) -> Comparison:
        reference = copy_reference(8, torch.float32, torch.device("cpu"), traffic=64)
        library = contender("eigenfilter", lambda t: t.mul_(2))
        peers = (contender("peer", peer),)
        return Comparison(library, peers, (reference,), TOLERANCE, 64, absent=("other: not there",))

    return Benchmark("doubling", "doubles", build, {"cpu": (Goal("peer", 1e-9),)})


def run_doubling(
    monkeypatch: pytest.MonkeyPatch, folder: Path, peer: Callable[[Tensor], object]
) -> tuple[int, dict[str, object]]:
    monkeypatch.setattr(registry, "BENCHMARKS", {"doubling": doubling(peer)})
    code = main(["bench", "--repeat", "3", "--out", str(folder)])
    (file,) = folder.glob("*.json")
    data = json.loads(file.read_text())
    assert data["complete"]
    (result,) = data["results"]
    return code, result


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_an_incomplete_run_has_written_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    def stop(setting: object) -> Comparison:
        raise ending

    first = doubling(lambda t: t.mul_(2))
    second = dataclasses.replace(first, name="stopped", build=stop)
    monkeypatch.setattr(registry, "BENCHMARKS", {"doubling": first, "stopped": second})
    with pytest.raises(ending):
        main(["bench", "--repeat", "3", "--out", str(tmp_path)])
    (file,), (text,) = tmp_path.glob("*-cpu.json"), tmp_path.glob("*-cpu.md")
    data = json.loads(file.read_text())
    assert not data["complete"]
    assert [result["name"] for result in data["results"]] == ["doubling"]
    assert "Incomplete: 1 of 2 timings so far." in text.read_text().splitlines()
    assert "| doubling | native |" in text.read_text()


def test_registry_has_the_main_benchmarks_and_their_goals() -> None:
    steps = {"usam-resnet18", "usam-small", "usam-large", "sgd-small", "sgd-large"}
    kernels = {
        f"{kernel}-{dtype}"
        for kernel in ("perturb", "sgd_step", "norm", "flag_nonfinite")
        for dtype in ("float32", "float64", "bfloat16", "float16")
    }
    assert set(registry.BENCHMARKS) >= steps | kernels
    goals = {
        (name, device, goal.against): goal.ratio
        for name, benchmark in registry.BENCHMARKS.items()
        for device, device_goals in benchmark.goals.items()
        for goal in device_goals
    }
    assert goals[("usam-resnet18", "cpu", "common SAM")] == 3
    assert goals[("usam-small", "cpu", "common SAM")] == 25
    assert goals[("usam-large", "cpu", "copy")] == pytest.approx(1 / 1.15)
    assert goals[("sgd-small", "cpu", "torch fused")] == 6
    assert goals[("sgd-large", "cpu", "torch fused")] == 1
    for network in ("resnet", "gpt"):
        limits = {"cpu": 1.08, "cuda": 1.03}
        for device, overhead in limits.items():
            goal = goals[(f"train-{network}-usam", device, training.GRADIENTS)]
            assert goal == pytest.approx(1 / overhead)
    assert goals[("usam-small", "cuda", "common SAM")] == 15
    assert goals[("sgd-small", "cuda", "torch fused")] == 2
    assert all(goals[(kernel, "cuda", "copy")] == 0.9 for kernel in kernels)


def test_resnet18_has_its_parameters() -> None:
    problem = shapes.TensorProblem(shapes.resnet18(), torch.device("cpu"))
    assert len(problem.shapes) == 62
    assert problem.elements == 11_689_512


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.mul_(2.001),
        lambda t: t.fill_(float("nan")),
        lambda t: t.resize_(4),
        lambda t: None,
    ],
    ids=["inaccurate", "nan", "other shape", "idle"],
)
def test_a_wrong_result_is_not_timed(
    wrong: Callable[[Tensor], object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, result = run_doubling(monkeypatch, tmp_path, wrong)
    assert code == 1
    assert result["timing"] is None
    row = next(line for line in capsys.readouterr().out.splitlines() if "doubling" in line)
    assert row.count("|") == len(report.COLUMNS) + 1
    assert "FAILED, not timed" in row
    assert "[" not in row


def test_an_absent_peer_has_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, result = run_doubling(monkeypatch, tmp_path, lambda t: t.mul_(2))
    assert result["absent"] == ["other: not there"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[-1].startswith("| doubling | native | other: not there |")
    assert {line.count("|") for line in table} == {len(report.COLUMNS) + 1}


def test_a_right_result_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run_doubling(monkeypatch, tmp_path, lambda t: t.add_(t))
    assert code == 0
    timing = result["timing"]
    assert isinstance(timing, dict)
    assert timing["rounds"] == 3
    assert 0 < timing["host"]["median"] <= timing["seconds"]["median"]
    against = {c["against"]: c for c in timing["comparisons"]}
    assert set(against) == {"peer", "copy"}
    assert against["peer"]["goal"] == 1e-9
    assert against["copy"]["goal"] is None


def test_one_row_runs_and_writes_its_results(tmp_path: Path) -> None:
    argv = ["bench", "--only", "sgd-small", "--repeat", "2", "--out", str(tmp_path)]
    assert main(argv) == 0
    (data,), (table,) = tmp_path.glob("*-cpu.json"), tmp_path.glob("*-cpu.md")
    results = json.loads(data.read_text())
    assert {"torch", "eigenfilter", "python", "compiler", "isa", "cpu", "threads", "load"} <= set(
        results["environment"]
    )
    (result,) = results["results"]
    assert result["name"] == "sgd-small"
    assert set(result["verdict"]["errors"]) == {"torch fused", "torch foreach"}
    assert max(result["verdict"]["errors"].values()) <= 1
    assert table.read_text().count("| sgd-small |") == 3


def test_distance_is_in_units_of_the_tolerance() -> None:
    a = [torch.tensor([1.0, 2.0])]
    b = [torch.tensor([1.0, 2.0 + 3 * (TOLERANCE.atol + TOLERANCE.rtol * 2)])]
    assert distance(a, b, TOLERANCE) == pytest.approx(3, rel=1e-2)
    assert distance(a, a, TOLERANCE) == 0


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
