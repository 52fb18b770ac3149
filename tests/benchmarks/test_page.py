"""The page of results shows what the files hold, under current names."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import environment, figures, page
from benchmarks.comparison import TOLERANCES
from benchmarks.measure import BenchmarkResult, RelativeTiming, TimingSummary
from benchmarks.timing import Spread
from benchmarks.verify import Verdict
from eigenfilter.experiments.cli import main

TOLERANCE = TOLERANCES[torch.float32]


def result(
    name: str,
    others: dict[str, tuple[float, float | None]],
    *,
    busy_cores: float = 0.0,
    device: str = "cpu",
    absent: tuple[str, ...] = (),
) -> BenchmarkResult:
    """A result whose step takes 2 ms, 1 ms of the host; `others` has ratios and goals by name."""
    ours, host = Spread(0.002, 0.002, 0.002), Spread(0.001, 0.001, 0.001)
    comparisons = tuple(
        RelativeTiming(
            other,
            Spread(0.9 * ratio / 500, ratio / 500, ratio / 400),
            Spread(0.003, 0.003, 0.003),
            1e9,
            Spread(0.9 * ratio, ratio, 1.25 * ratio),
            goal,
        )
        for other, (ratio, goal) in others.items()
    )
    timing = TimingSummary(3, 4_000_000, ours, host, 2e9, comparisons, busy_cores)
    return BenchmarkResult(
        name, name, device, "native", Verdict({}, TOLERANCE), timing, 0.0, absent
    )


def failed(name: str) -> BenchmarkResult:
    return BenchmarkResult(
        name, name, "cpu", "native", Verdict({"peer": 9.0}, TOLERANCE), None, 0.0
    )


def write(folder: Path, **data: object) -> str:
    where = environment.describe(torch.device("cpu"))
    path = folder / "results.json"
    path.write_text(json.dumps({"date": "today", "environment": where, **data}))
    return str(path)


def timings(folder: Path, *results: BenchmarkResult) -> str:
    return write(folder, results=[asdict(r) for r in results])


def test_goals_are_met_missed_or_not_judged(tmp_path: Path) -> None:
    file = timings(
        tmp_path,
        result("sgd-small", {"torch fused": (7.0, 6.0), "copy": (0.5, None)}),
        result("usam-small", {"common SAM": (5.0, 25.0)}, absent=("other is not there",)),
        result("sgd-large", {"torch fused": (0.5, 1.0), "copy": (1.0, None)}, busy_cores=0.9),
        failed("sam-small"),
    )
    assert main(["bench", "page", file, "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "benchmarks.md").read_text().splitlines()
    assert "1 met, 1 missed, 1 not judged." in lines
    missed = lines.index("| missed | against | ratio | goal |") + 2
    row = "| usam-small | common SAM | 5.00 [4.50, 6.25] | 25.00 |"
    assert lines[missed : missed + 2] == [row, ""]
    other = lines.index("| not judged | against | ratio | goal |")
    assert lines[other + 2].startswith("| sgd-large |")
    assert "- `sam-small`: FAILED, not timed" in lines
    assert "- `usam-small`: other is not there" in lines


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("usam-small", "steps"),
        ("usam-small", "host"),
        ("usam-gpt2", "bandwidth"),
        ("norm-float16", "bandwidth"),
        ("train-gpt-usam", "training"),
    ],
)
def test_a_section_has_its_figure(name: str, section: str, tmp_path: Path) -> None:
    file = timings(tmp_path, result(name, {"common SAM": (2.0, 3.0), "copy": (0.5, None)}))
    assert main(["bench", "page", file, "--out", str(tmp_path)]) == 0
    path = f"figures/benchmarks-cpu-native-{section}.png"
    assert f"]({path})" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")


def test_without_rows_there_is_no_figure(tmp_path: Path) -> None:
    file = timings(tmp_path, failed("usam-small"))
    assert main(["bench", "page", file, "--out", str(tmp_path)]) == 0
    assert list((tmp_path / "figures").iterdir()) == []


@pytest.mark.parametrize(("device", "ours"), [("cpu", 2.0), ("cuda", 1.0)])
def test_the_host_time_of_a_cpu_is_the_whole_time(
    device: str, ours: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels_by_figure = {}
    monkeypatch.setattr(
        figures, "draw", lambda panels, path, **_: panels_by_figure.update({path.stem: panels})
    )
    file = timings(tmp_path, result("sgd-small", {"torch fused": (7.0, 6.0)}, device=device))
    page.write([Path(file)], tmp_path)
    (panel,) = panels_by_figure[f"benchmarks-{device}-native-host"].values()
    assert panel["sgd"]["ours"].value == pytest.approx(ours)


def test_memory(tmp_path: Path) -> None:
    file = write(tmp_path, device="cpu", elements=1000, memory={"SGD": 12.0, "USAM": 16.0})
    assert main(["bench", "page", file, "--out", str(tmp_path)]) == 0
    assert "](figures/benchmarks-cpu-memory.png)" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "figures" / "benchmarks-cpu-memory.png").exists()


def test_launches(tmp_path: Path) -> None:
    us = {"low": 9.0, "median": 10.4, "high": 12.0}
    ours = {"call": "norm", "tensors": 2000, "by": "native", "us": us}
    ratio = {"low": 1.1, "median": 1.2, "high": 1.3}
    peer = {"launches": None, "argument_bytes": None, "ratio": None, "by": "torch foreach"}
    costs = [ours | {"launches": 2, "argument_bytes": 3072, "ratio": ratio}, ours | peer]
    file = write(tmp_path, host=costs, busy_cores=0.1, complete=False)
    assert main(["bench", "page", file, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "benchmarks.md").read_text()
    row = "| `norm` | 2,000 | native | 10 [9, 12] | 2 | 3.0 | 1.20 [1.10, 1.30] |"
    assert row in text.splitlines()
    assert "| `norm` | 2,000 | torch foreach | 10 [9, 12] |  |  |  |" in text.splitlines()
    assert "The run was stopped before its end." in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("{}", "holds no timings, memory, curvature or costs of launches"),
    ],
)
def test_other_files_are_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    assert main(["bench", "page", str(file), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_figures_need_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = timings(tmp_path, failed("usam-small"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "page", file, "--out", str(tmp_path)]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_committed_results_can_be_drawn(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    elsewhere = ("loop", "monitor", "scale")  # in docs/training.md and docs/curvature.md
    paths = sorted(folder.glob("*-cpu*.json"))
    files = [str(path) for path in paths if not path.stem.endswith(elsewhere)]
    assert main(["bench", "page", *files, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "benchmarks.md").read_text()
    assert all(f"`{Path(file).name}`" in text for file in files)
    assert not any(former in text for former in ("descend", "ascend", "project-out", "no copies"))


def test_kernels_of_former_results_are_drawn_under_their_current_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels_by_figure = {}
    monkeypatch.setattr(
        figures, "draw", lambda panels, path, **_: panels_by_figure.update({path.stem: panels})
    )
    file = timings(tmp_path, result("descend_adamw-float16", {"copy": (0.5, None)}))
    page.write([Path(file)], tmp_path)
    panels = panels_by_figure["benchmarks-cpu-native-bandwidth"]
    assert panels["kernels"]["adamw_step"]["float16"].value == 0.5
