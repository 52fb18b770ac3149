"""The benchmarks: complete, silent where a check is red, and able to write their results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import registry, report, shapes, training
from benchmarks.contest import (
    TOLERANCES,
    Benchmark,
    Contender,
    Contest,
    Goal,
    Phase,
    copy,
    nothing,
)
from benchmarks.timing import Spread
from benchmarks.verify import distance
from eigenfilter.experiments.cli import main

TOLERANCE = TOLERANCES[torch.float32]


def doubling(peer: Callable[[Tensor], object]) -> Benchmark:
    """A benchmark whose library doubles a tensor, and whose peer does what it is given."""

    def contender(name: str, work: Callable[[Tensor], object]) -> Contender:
        t = torch.ones(8)
        return Contender(name, (Phase(nothing, lambda: work(t)),), lambda: [t])

    def build(setting: object) -> Contest:
        yardstick = copy(8, torch.float32, torch.device("cpu"), moved=64)
        library = contender("eigenfilter", lambda t: t.mul_(2))
        peers = (contender("peer", peer),)
        return Contest(library, peers, (yardstick,), TOLERANCE, 64, absent=("other: not there",))

    return Benchmark("doubling", "doubles", build, {"cpu": (Goal("peer", 1e-9),)})


def run_doubling(
    monkeypatch: pytest.MonkeyPatch, folder: Path, peer: Callable[[Tensor], object]
) -> tuple[int, dict[str, object]]:
    monkeypatch.setattr(registry, "BENCHMARKS", {"doubling": doubling(peer)})
    code = main(["bench", "--repeat", "3", "--out", str(folder)])
    (file,) = folder.glob("*.json")
    found = json.loads(file.read_text())
    assert found["complete"]
    (result,) = found["results"]
    return code, result


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_what_was_timed_before_the_end_is_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    def stop(setting: object) -> Contest:
        raise ending

    first = doubling(lambda t: t.mul_(2))
    stopped = dataclasses.replace(first, name="stopped", build=stop)
    monkeypatch.setattr(registry, "BENCHMARKS", {"doubling": first, "stopped": stopped})
    with pytest.raises(ending):
        main(["bench", "--repeat", "3", "--out", str(tmp_path)])
    (file,), (text,) = tmp_path.glob("*-cpu.json"), tmp_path.glob("*-cpu.md")
    found = json.loads(file.read_text())
    assert not found["complete"]
    assert [result["name"] for result in found["results"]] == ["doubling"]
    assert "Incomplete: 1 of 2 timings so far." in text.read_text().splitlines()
    assert "| doubling | native |" in text.read_text()


def test_registry_holds_every_row_of_the_design() -> None:
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
        for device, given in benchmark.goals.items()
        for goal in given
    }
    assert goals[("usam-resnet18", "cpu", "common SAM")] == 3
    assert goals[("usam-small", "cpu", "common SAM")] == 25
    assert goals[("usam-large", "cpu", "copy")] == pytest.approx(1 / 1.15)
    assert goals[("sgd-small", "cpu", "torch fused")] == 6
    assert goals[("sgd-large", "cpu", "torch fused")] == 1
    for network in ("resnet", "gpt"):
        most = {"cpu": 1.08, "cuda": 1.03}
        for device, overhead in most.items():
            goal = goals[(f"train-{network}-usam", device, training.PASSES)]
            assert goal == pytest.approx(1 / overhead)
    assert goals[("usam-small", "cuda", "common SAM")] == 15
    assert goals[("sgd-small", "cuda", "torch fused")] == 2
    assert all(goals[(kernel, "cuda", "copy")] == 0.9 for kernel in kernels)


def test_resnet18_has_its_parameters() -> None:
    problem = shapes.Problem(shapes.resnet18(), torch.device("cpu"))
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
def test_a_wrong_result_is_red_and_not_timed(
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
    assert "RED, not timed" in row
    assert "[" not in row


def test_who_is_absent_has_a_row(
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
    found = json.loads(data.read_text())
    assert {"torch", "eigenfilter", "python", "compiler", "isa", "cpu", "threads", "load"} <= set(
        found["environment"]
    )
    (result,) = found["results"]
    assert result["name"] == "sgd-small"
    assert set(result["verdict"]["errors"]) == {"torch fused", "torch foreach"}
    assert max(result["verdict"]["errors"].values()) <= 1
    assert table.read_text().count("| sgd-small |") == 3


def test_distance_is_in_tolerances() -> None:
    a = [torch.tensor([1.0, 2.0])]
    b = [torch.tensor([1.0, 2.0 + 3 * (TOLERANCE.atol + TOLERANCE.rtol * 2)])]
    assert distance(a, b, TOLERANCE) == pytest.approx(3, rel=1e-2)
    assert distance(a, a, TOLERANCE) == 0


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
