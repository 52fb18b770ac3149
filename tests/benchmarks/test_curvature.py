"""`eigenfilter bench curvature`: values are checked before times, and absent ones are named."""

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
from torch import nn

from benchmarks.curvature import (
    library_solvers,
    problem_data,
    run,
    solver_comparison,
    tables,
    tracking,
)
from benchmarks.curvature.peers.pyhessian import SOLVERS as PYHESSIAN
from benchmarks.curvature.problem_data import MissingRequirement
from benchmarks.curvature.problems import HessianProblem, ProblemRecipe, product
from benchmarks.curvature.solver import Solution, Solver, count_calls
from eigenfilter.experiments.cli import main

TINY = ProblemRecipe(
    "MLP 64-8-10",
    lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)),
    problem_data.digits,
    40,
    steps=30,
    lr=0.1,
)


def slow(problem: HessianProblem) -> Solution:
    """Solve like the library, but only after a minute if the problem is TINY."""
    while len(problem.batches[0][0]) == TINY.samples and time.process_time() < 60:
        pass
    return library_solvers.solve(problem)


def tiny(batch: int | None) -> HessianProblem:
    return dataclasses.replace(TINY, batch=batch).build(Path())


def hessian(problem: HessianProblem) -> torch.Tensor:
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
def test_exact_values_and_products_are_of_the_hessian(batch: int | None) -> None:
    problem = tiny(batch)
    dense = hessian(problem)
    values, gap = solver_comparison.exact_values(problem)
    exact = torch.linalg.eigvalsh(dense).flip(0)[: len(values)]
    assert torch.allclose(values, exact, rtol=1e-8)
    assert gap < 1e-8
    row_sums = product(problem, problem.gradients(), keep_graph=False)
    assert torch.allclose(
        torch.cat([h.flatten() for h in row_sums]).double(), dense.sum(1), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 20], ids=["batch", "loader"])
@pytest.mark.parametrize("solver", solver_comparison.SOLVERS, ids=lambda s: s.name)
def test_every_contender_finds_the_largest_eigenvalue(solver: Solver, batch: int | None) -> None:
    try:
        solver.check_installed()
    except MissingRequirement as missing:
        pytest.skip(str(missing))
    problem = tiny(batch)
    exact, _ = solver_comparison.exact_values(problem)
    *_, solve = solver.settings.values()
    solution = solve(problem)
    assert float(solution.values.max()) == pytest.approx(float(exact[0]), rel=2e-2)
    assert solution.products >= len(exact)
    assert all(p.grad is None for p in problem.params)


@pytest.mark.slow
def test_a_run_writes_its_results_and_the_page_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, tables):
        monkeypatch.setattr(module, "RECIPES", {"tiny": TINY})
    for module in (tracking, tables):
        monkeypatch.setattr(module, "PROBLEM", "tiny")
    monkeypatch.setattr(tracking, "CHECKS", 3)
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    solvers = (library_solvers.DEFAULTS, library_solvers.WITHOUT_CHECK, library_solvers.SCIPY)
    monkeypatch.setattr(solver_comparison, "SOLVERS", (*solvers, *PYHESSIAN))
    threads = torch.get_num_threads()
    assert main(["bench", "--repeat", "1", "curvature", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    (file,) = tmp_path.glob("*-cpu-curvature.json")
    results = json.loads(file.read_text())
    assert results["environment"]["threads"] == 1
    (row,) = results["curvature"]
    assert row["name"] == "tiny"
    assert row["parameters"] == 610
    assert row["absent"] == [
        f"{solver.name}: pyhessian is not installed: pip install --group bench"
        for solver in PYHESSIAN
    ]
    entries = {entry["solver"]: entry for entry in row["entries"]}
    assert entries["eigenfilter"]["reached"]
    assert entries["eigenfilter"]["ratios"]["eigenfilter"]["median"] == 1
    without_check = entries[library_solvers.WITHOUT_CHECK.name]
    assert entries["eigenfilter"]["products"] > without_check["products"]
    assert all(0 < entry["memory"] < 100e6 for entry in entries.values())
    assert [track["way"] for track in results["tracking"]] == list(tracking.WAYS)
    assert all(track["error"] < tracking.TOL for track in results["tracking"])
    assert main(["bench", "page", str(file), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "### tiny: MLP 64-8-10" in page
    assert "| pyhessian is not installed" not in page
    assert "PyHessian: pyhessian is not installed" in page


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--only", "mlp-mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    assert main(["bench", "curvature", *argv]) == 0
    message = f"mlp-mnist: train-images-idx3-ubyte is not in {tmp_path / 'MNIST' / 'raw'}"
    assert message in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["absent"][0].startswith(message)


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "curvature", "--only", "no-such"]) == 2
    assert "no problem 'no-such': choose from mlp-digits, " in capsys.readouterr().err


def test_files_are_read(tmp_path: Path) -> None:
    cifar = tmp_path / "cifar-10-batches-bin"
    cifar.mkdir()
    pixels = np.arange(2 * 784).astype(np.uint8)
    for name, read in (("MNIST", problem_data.mnist), ("FashionMNIST", problem_data.fashion)):
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
    images, labels = problem_data.cifar10(2, tmp_path)
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert images.std() == pytest.approx(1.0)


def test_text_labels_are_the_next_characters() -> None:
    x, y = problem_data.text(3, Path())
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_a_ratio_counts_only_where_the_accuracy_was_reached() -> None:
    spread = {"low": 3.9, "median": 4.0, "high": 4.1}
    ratios = {
        library_solvers.DEFAULTS.name: spread,
        library_solvers.WITHOUT_CHECK.name: {**spread, "median": 6.0},
    }
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
        table = tables.table({**row, "entries": [{**entry, **changes}]})
        return next(line for line in table if line.startswith("| peer |"))

    assert "| (4.00 [3.90, 4.10]) |" in line()
    assert line().endswith("| 5 not judged |")
    assert line(reached=True).endswith(
        "| 4.00 [3.90, 4.10] | 6.00 [3.90, 4.10] | 5 met without the check |"
    )
    assert line(reached=True, goal=4.0).endswith("| 4 met |")
    assert line(reached=True, goal=7.0).endswith("| 7 missed |")
    stopped = {"stopped": True, "products": None, "error": None, "memory": None}
    end = "| stopped |  |  | > 4 | > 4.0 | > 4.00 | > 6.00 |"
    assert line(**stopped, goal=4.0).endswith(f"{end} 4 met |")
    assert line(**stopped).endswith(f"{end} 5 not judged |")


@pytest.mark.slow
def test_a_slow_contender_on_a_large_problem_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The subprocess imports `slow` from there.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    peer = Solver("peer", {"loose": library_solvers.solve, "tight": slow}, goal=2.0)
    solvers = (library_solvers.DEFAULTS, library_solvers.WITHOUT_CHECK, peer)
    monkeypatch.setattr(solver_comparison, "SOLVERS", solvers)
    monkeypatch.setattr(solver_comparison, "ACCURACY", -1.0)  # no contender is accurate enough
    # The library's own solver takes less, even on a busy machine.
    monkeypatch.setattr(solver_comparison, "LIMIT", 100)
    row = solver_comparison.measure("tiny", dataclasses.replace(TINY, large=True), Path(), 3)
    defaults, without_check, last = row.entries
    assert (row.rounds, row.gap) == (1, None)
    assert defaults.products is not None
    assert defaults.memory is not None
    assert 0 < defaults.memory < 100e6
    assert (last.setting, last.stopped, last.products, last.memory) == ("tight", True, None, None)
    assert last.ratios[without_check.solver].median == pytest.approx(solver_comparison.LIMIT)


@pytest.mark.slow
def test_large_problems_run_only_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = dataclasses.replace(TINY, large=True)
    for module in (run, tables):
        monkeypatch.setattr(module, "RECIPES", {"tiny": TINY, "huge": large})
    assert run.select([]) == ["tiny", run.TRACKING]
    assert run.select(["h*", "tiny"]) == ["tiny", "huge"]

    solvers = (library_solvers.DEFAULTS, library_solvers.WITHOUT_CHECK)
    monkeypatch.setattr(solver_comparison, "SOLVERS", solvers)
    assert main(["bench", "curvature", "--only", "huge", "--out", str(tmp_path)]) == 0
    [file] = tmp_path.glob("*-cpu-curvature-large.json")
    assert main(["bench", "page", str(file), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## Curvature of large networks: cpu" in page
    assert tables.LEGEND not in page
    assert "### huge: MLP 64-8-10" in page


def test_calls_are_counted_within_the_context() -> None:
    owner = SimpleNamespace(double=lambda x: 2 * x)
    with count_calls(owner, "double") as calls:
        assert owner.double(3) == 6
    assert owner.double(4) == 8
    assert calls == [1]
