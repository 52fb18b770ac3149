"""`eigenfilter bench curvature`: right values before any time, and a word on whoever is missing."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.curvature import contest, datasets, report, run, tracking
from benchmarks.curvature.datasets import Missing
from benchmarks.curvature.peers.pyhessian import SOLVERS as PYHESSIAN
from benchmarks.curvature.problems import Problem, Recipe, product
from benchmarks.curvature.solver import Found, Solver, counted
from torch import nn

from eigenfilter.experiments.cli import main

TINY = Recipe(
    "MLP 64-8-10",
    lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)),
    datasets.digits,
    40,
    steps=30,
    lr=0.1,
)


def slow(problem: Problem) -> Found:
    """As ours, after a minute on all but the process's first, small problem."""
    while len(problem.batches[0][0]) == TINY.samples and time.process_time() < 60:
        pass
    return contest.ours.solve(problem)


def tiny(batch: int | None) -> Problem:
    return dataclasses.replace(TINY, batch=batch).build(Path())


def hessian(problem: Problem) -> torch.Tensor:
    """The Hessian in float64, entry by entry."""
    double = problem.double()
    x, y = (torch.cat(part) for part in zip(*double.batches, strict=True))
    shapes = [p.shape for p in double.params]
    names = [name for name, _ in double.model.named_parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        at = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return double.loss_fn(torch.func.functional_call(double.model, at, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in double.params])
    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("batch", [None, 16], ids=["batch", "uneven loader"])
def test_reference_and_products_are_of_the_hessian(batch: int | None) -> None:
    problem = tiny(batch)
    dense = hessian(problem)
    values, gap = contest.reference(problem)
    exact = torch.linalg.eigvalsh(dense).flip(0)[: len(values)]
    assert torch.allclose(values, exact, rtol=1e-8)
    assert gap < 1e-8
    found = product(problem, problem.gradients(), keep=False)
    assert torch.allclose(
        torch.cat([h.flatten() for h in found]).double(), dense.sum(1), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("batch", [None, 20], ids=["batch", "loader"])
@pytest.mark.parametrize("solver", contest.SOLVERS, ids=lambda s: s.name)
def test_every_contender_finds_the_largest(solver: Solver, batch: int | None) -> None:
    try:
        solver.check()
    except Missing as missing:
        pytest.skip(str(missing))
    problem = tiny(batch)
    exact, _ = contest.reference(problem)
    *_, solve = solver.settings.values()
    found = solve(problem)
    assert float(found.values.max()) == pytest.approx(float(exact[0]), rel=2e-2)
    assert found.products >= len(exact)
    assert all(p.grad is None for p in problem.params)


def test_a_run_writes_its_results_and_the_page_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, report):
        monkeypatch.setattr(module, "RECIPES", {"tiny": TINY})
    monkeypatch.setattr(tracking, "TRACKED", "tiny")
    monkeypatch.setattr(report, "TRACKED", "tiny")
    monkeypatch.setattr(tracking, "CHECKS", 3)
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    mine = (contest.ours.OURS, contest.ours.ALONE, contest.ours.SCIPY)
    monkeypatch.setattr(contest, "SOLVERS", (*mine, *PYHESSIAN))
    threads = torch.get_num_threads()
    assert main(["bench", "--repeat", "1", "curvature", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    (file,) = tmp_path.glob("*-cpu-curvature.json")
    found = json.loads(file.read_text())
    assert found["environment"]["threads"] == 1
    (row,) = found["curvature"]
    assert row["name"] == "tiny"
    assert row["parameters"] == 610
    assert row["absent"] == [
        f"{solver.name}: pyhessian is not installed: pip install --group bench"
        for solver in PYHESSIAN
    ]
    entries = {entry["solver"]: entry for entry in row["entries"]}
    assert entries["eigenfilter"]["reached"]
    assert entries["eigenfilter"]["ratios"]["eigenfilter"]["median"] == 1
    assert entries["eigenfilter"]["products"] > entries["eigenfilter, no copies"]["products"]
    assert all(0 < entry["memory"] < 100e6 for entry in entries.values())
    assert [track["way"] for track in found["tracking"]] == list(tracking.WAYS)
    assert all(track["error"] < tracking.TOL for track in found["tracking"])
    assert main(["bench", "page", str(file), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "### tiny: MLP 64-8-10" in page
    assert "| pyhessian is not installed" not in page
    assert "PyHessian: pyhessian is not installed" in page


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--only", "mlp-mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    assert main(["bench", "curvature", *argv]) == 0
    says = f"mlp-mnist: train-images-idx3-ubyte is not in {tmp_path / 'MNIST' / 'raw'}"
    assert says in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["absent"][0].startswith(says)


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "curvature", "--only", "no-such"]) == 2
    assert "no problem 'no-such'; there are mlp-digits, " in capsys.readouterr().err


def test_files_are_read(tmp_path: Path) -> None:
    cifar = tmp_path / "cifar-10-batches-bin"
    cifar.mkdir()
    pixels = np.arange(2 * 784).astype(np.uint8)
    for name, read in (("MNIST", datasets.mnist), ("FashionMNIST", datasets.fashion)):
        raw = tmp_path / name / "raw"
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte").write_bytes(bytes(16) + pixels.tobytes())
        (raw / "train-labels-idx1-ubyte").write_bytes(bytes(8) + bytes([7, len(name)]))
        images, labels = read(2, tmp_path)
        assert images.shape == (2, 784)
        assert labels.tolist() == [7, len(name)]
        assert images[0, :256].diff().std() < 1e-5
    records = np.arange(2 * 3073).astype(np.uint8).reshape(2, 3073)
    (cifar / "data_batch_1.bin").write_bytes(records.tobytes())
    images, labels = datasets.cifar10(2, tmp_path)
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert images.std() == pytest.approx(1.0)


def test_text_is_followed_by_what_follows() -> None:
    x, y = datasets.text(3, Path())
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_a_ratio_counts_only_where_the_accuracy_was_reached() -> None:
    spread = {"low": 3.9, "median": 4.0, "high": 4.1}
    ratios = {contest.ours.OURS.name: spread, contest.ours.ALONE.name: {**spread, "median": 6.0}}
    entry = {
        "solver": "peer",
        "setting": "defaults",
        "stopped": False,
        "products": 9,
        "error": 1e-3,
        "memory": 5e6,
        "reached": False,
        "seconds": spread,
        "units": spread,
        "ratios": ratios,
        "goal": 5.0,
    }
    row = {
        "name": "tiny",
        "summary": "",
        "parameters": 9,
        "unit": spread,
        "rounds": 1,
        "gap": 0.0,
        "overhead": {"median": 1.2},
        "absent": [],
    }

    def line(**changes: object) -> str:
        table = report.table({**row, "entries": [{**entry, **changes}]})
        return next(line for line in table if line.startswith("| peer |"))

    assert "| (4.00 [3.90, 4.10]) |" in line()
    assert line().endswith("| 5 not judged |")
    assert line(reached=True).endswith(
        "| 4.00 [3.90, 4.10] | 6.00 [3.90, 4.10] | 5 met without copies |"
    )
    assert line(reached=True, goal=4.0).endswith("| 4 met |")
    assert line(reached=True, goal=7.0).endswith("| 7 missed |")
    stopped = {"stopped": True, "products": None, "error": None, "memory": None}
    end = "| stopped |  |  | > 4 | > 4.0 | > 4.00 | > 6.00 |"
    assert line(**stopped, goal=4.0).endswith(f"{end} 4 met |")
    assert line(**stopped).endswith(f"{end} 5 not judged |")


def test_whoever_takes_too_long_on_a_large_problem_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # there it finds `slow`
    ours = contest.ours
    peer = Solver("peer", {"loose": ours.solve, "tight": slow}, goal=2.0)
    monkeypatch.setattr(contest, "SOLVERS", (ours.OURS, ours.ALONE, peer))
    monkeypatch.setattr(contest, "ACCURACY", -1.0)  # nobody is accurate enough
    monkeypatch.setattr(contest, "LIMIT", 100)  # as long as ours, even on a busy machine
    row = contest.measure("tiny", dataclasses.replace(TINY, large=True), Path(), 3)
    mine, alone, last = row.entries
    assert (row.rounds, row.gap) == (1, None)
    assert mine.products is not None
    assert mine.memory is not None
    assert 0 < mine.memory < 100e6
    assert (last.setting, last.stopped, last.products, last.memory) == ("tight", True, None, None)
    assert last.ratios[alone.solver].median == pytest.approx(contest.LIMIT)


def test_large_problems_want_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = dataclasses.replace(TINY, large=True)
    for module in (run, report):
        monkeypatch.setattr(module, "RECIPES", {"tiny": TINY, "huge": large})
    assert run.select([]) == ["tiny", run.TRACKING]
    assert run.select(["h*", "tiny"]) == ["tiny", "huge"]

    monkeypatch.setattr(contest, "SOLVERS", (contest.ours.OURS, contest.ours.ALONE))
    assert main(["bench", "curvature", "--only", "huge", "--out", str(tmp_path)]) == 0
    [file] = tmp_path.glob("*-cpu-curvature-large.json")
    assert main(["bench", "page", str(file), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## Curvature of large networks: cpu" in page
    assert report.LEGEND not in page
    assert "### huge: MLP 64-8-10" in page


def test_calls_are_counted_while_they_are_wanted() -> None:
    owner = SimpleNamespace(double=lambda x: 2 * x)
    with counted(owner, "double") as calls:
        assert owner.double(3) == 6
    assert owner.double(4) == 8
    assert calls == [1]
