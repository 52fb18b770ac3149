"""The numbers of the phenomena: at the edge, away from the saddle, down after a switch."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
import torch

from eigenfilter import filters
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.full_batch import BAND, SharpnessMeasurement
from eigenfilter.experiments.full_batch_data import fashion
from eigenfilter.experiments.full_batch_problems import load
from eigenfilter.experiments.phenomena import moving_edge, saddle
from eigenfilter.experiments.phenomena.common import (
    PhenomenonSetting,
    settled_ratio,
    train,
    verdict,
)
from eigenfilter.experiments.phenomena.sharpening import methods
from experiments import folders
from marks import rest_slow

EDGE = 9.0  # gradient flow starts at a sharpness of 6 and passes 15
METHODS = {method.name: method for method in methods(EDGE)}


def reproduce(name: str, folder: Path, *options: str) -> dict:
    assert main(["phenomena", name, "--out", str(folder), *options]) == 0
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "results.json").read_text())


def make_setting(
    folder: Path, activation: str, loss: str, edge: float, steps: int
) -> PhenomenonSetting:
    names = ("digits", activation, loss)
    deadline = time.perf_counter() + 3600.0
    return PhenomenonSetting(load(*names), names, edge, 0, steps, deadline, folder)


@pytest.mark.parametrize("name", rest_slow(METHODS, "USAM"))
def test_the_sharpness_rises_to_the_edge_and_stays(name: str, tmp_path: Path) -> None:
    run = train(make_setting(tmp_path, "tanh", "square", EDGE, 600), METHODS[name])
    assert all(check.edge == pytest.approx(EDGE, rel=1e-9) for check in run.history)
    assert run.history[0].ratio < 0.85
    settled = settled_ratio(run.history)
    assert settled.mean == pytest.approx(1.0, abs=0.06)
    assert settled.spread < 0.05
    assert run.outcome == "at its edge"
    assert run.last.loss < 0.3 * run.history[0].loss


def test_relu_comes_to_its_edge_less_closely(tmp_path: Path) -> None:
    """The loss has kinks, which the theory does not cover."""
    method = methods(7.0)[0]
    run = train(make_setting(tmp_path, "relu", "square", 7.0, 480), method)
    assert settled_ratio(run.history).mean == pytest.approx(1.0, abs=0.15)
    assert run.history[0].ratio < 0.9


def test_cross_entropy_leaves_its_edge_with_the_loss(tmp_path: Path) -> None:
    """The loss has no minimum, so that the sharpness goes to 0 with the loss."""
    run = train(make_setting(tmp_path, "tanh", "cross_entropy", 0.8, 480), methods(0.8)[0])
    assert run.outcome == "left its edge downwards"
    assert settled_ratio(run.history).peak > 1.0 - BAND
    assert run.last.ratio < 0.1
    assert run.last.loss < 0.01
    half = run.history[len(run.history) // 2]
    assert run.last.loss < half.loss
    assert run.last.sharpness < half.sharpness


def test_relu_and_cross_entropy_pass_the_edge_and_leave_it_at_once(tmp_path: Path) -> None:
    run = train(make_setting(tmp_path, "relu", "cross_entropy", 1.0, 60), methods(1.0)[0])
    ratios = {check.step: check.ratio for check in run.history}
    assert max(ratios[step] for step in range(6)) > 1.1
    assert all(ratio < 0.5 for step, ratio in ratios.items() if step >= 30)
    assert run.outcome == "left its edge downwards"


@pytest.mark.slow
def test_a_late_switch_to_usam_lowers_the_sharpness(tmp_path: Path) -> None:
    results = reproduce("late", tmp_path, "--edge", "7", "--steps", "1500")
    plain, switched = results["runs"]
    assert plain["edge"] == pytest.approx(7.0, rel=1e-9)
    assert switched["history"][0]["edge"] == pytest.approx(7.0, rel=1e-9)
    assert switched["edge"] == pytest.approx(0.8 * 7.0, rel=1e-9)
    before = [c for c in switched["history"] if c["step"] < 750]
    same = [c for c in plain["history"] if c["step"] < 750]
    assert [c["sharpness"] for c in before] == [c["sharpness"] for c in same]
    assert all(part["mean"] == pytest.approx(1.0, abs=0.06) for part in results["before"])
    assert plain["settled"]["mean"] == pytest.approx(1.0, abs=0.06)
    assert switched["settled"]["mean"] == pytest.approx(1.0, abs=0.08)
    assert switched["sharpness"] < 0.9 * plain["sharpness"]


@pytest.mark.slow
def test_the_sharpness_follows_an_edge_that_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = reproduce("moving-edge", tmp_path, "--edge", "7", "--steps", "1800")
    start, down, up, higher, last = results["phases"]
    edges = [part["edge"] / 7.0 for part in results["phases"]]
    assert edges == pytest.approx([1.0, 0.8, 1.0, 1.25, 0.9], rel=1e-9)
    for part in (start, down, last):  # what a filter holds down
        assert part["settled"]["mean"] == pytest.approx(1.0, abs=0.08)
    for part in (down, last):
        assert part["began_at"] > 1.1
    for part in (up, higher):  # what sharpening has to bring up
        assert part["began_at"] < 0.9
        assert part["began_at"] + 0.05 < part["settled"]["mean"] < 1.08
    text = capsys.readouterr().out
    assert "rho raised" in text
    assert f"{down['settled']['mean']:.3g}" in text


def test_phases_are_usams_own() -> None:
    for phase, factor in zip(moving_edge.phases(12.0), (1.0, 0.8, 1.0, 1.25, 0.9), strict=True):
        flt = filters.USAM(phase.lr, rho=phase.rho)
        assert flt.max_eigenvalue() == pytest.approx(12.0 * factor, rel=1e-9)


@pytest.mark.slow
def test_where_the_methods_end_at_the_saddle(tmp_path: Path) -> None:
    results = reproduce("saddle", tmp_path)
    ends = {each["method"]: set(each["ends"]) for each in results["methods"]}
    assert ends == {
        "gradient descent": {"minimum"},
        "USAM": {"saddle"},
        "two-step USAM": {"no critical point"},
        "two-step USAM, anchored": {"minimum"},
        "Hessian USAM": {"minimum"},
    }
    for each in results["methods"]:
        assert each["measured_factor"] == pytest.approx(each["predicted_factor"], abs=1e-9)
        assert each["admitted"] == (each["predicted_factor"] < 1.0) == (each["method"] == "USAM")
    # Where x + rho grad f(x) is the saddle: y^2 = b - 1 / rho, with a slope of -y / rho.
    astray = math.sqrt(saddle.B - 1.0 / saddle.RHO)
    two_step = results["methods"][2]
    assert [abs(y) for y in two_step["last_y"]] == pytest.approx([astray] * 8, abs=1e-4)
    assert two_step["largest_slope"] == pytest.approx(astray / saddle.RHO, abs=1e-4)


def test_the_saddle_holds_usam_in_the_basin_that_theory_gives() -> None:
    border = math.sqrt(saddle.B - 1.0 / saddle.RHO)
    within, beyond = saddle.follow("USAM", (0.99 * border, 1.01 * border), 2000)[-1].tolist()
    assert abs(within) < 1e-6
    assert beyond == pytest.approx(math.sqrt(saddle.B), abs=1e-6)


@pytest.mark.data
def test_fashion_mnist(tmp_path: Path) -> None:
    folder = os.environ.get("EIGENFILTER_DATA")
    if folder is None or not any(Path(folder, "FashionMNIST/raw").glob("*")):
        pytest.skip("needs EIGENFILTER_DATA with FashionMNIST/raw")
    results = reproduce(
        "late", tmp_path, "--dataset", "fashion", "--loss", "cross_entropy", "--steps", "12"
    )
    assert results["samples"] == 5000
    plain, switched = results["runs"]
    assert plain["loss"] < 0.7 * plain["history"][0]["loss"]
    assert switched["edge"] == pytest.approx(0.8 * plain["edge"], rel=1e-9)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("loss", "edge"), [("square", 12.0), ("cross_entropy", 5.0)])
def test_relu_on_fashion_mnist_comes_to_its_edge(loss: str, edge: float, tmp_path: Path) -> None:
    """Heavy ball reaches the edge within 200 steps; with cross-entropy it leaves again later."""
    folder = os.environ.get("EIGENFILTER_DATA")
    if folder is None or not any(Path(folder, "FashionMNIST/raw").glob("*")):
        pytest.skip("needs EIGENFILTER_DATA with FashionMNIST/raw")
    names = ("fashion", "relu", loss)
    deadline = time.perf_counter() + 3600.0
    task = PhenomenonSetting(load(*names), names, edge, 0, 300, deadline, tmp_path)
    run = train(task, methods(edge)[1])
    assert run.history[0].ratio < 0.6
    assert settled_ratio(run.history).mean == pytest.approx(1.0, abs=0.12)


def test_fashion_mnist_is_centered(tmp_path: Path) -> None:
    folders.mnist(tmp_path, "FashionMNIST")
    data = fashion(50, tmp_path)
    assert data.inputs.shape == (50, 784)
    assert data.test_inputs.shape == (20, 784)
    assert data.inputs.dtype == torch.float32
    assert data.inputs.mean(dim=0).abs().max() < 1e-6
    assert 0.2 < float(data.inputs.max() - data.inputs.min()) <= 2.0


def test_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.mnist(tmp_path, "FashionMNIST")
    options = ["--dataset", "fashion", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["phenomena", "late", *options]) == 2
    error = capsys.readouterr().err
    assert error == "eigenfilter phenomena: error: fashion has 60 training images, not 5000\n"
    assert not (tmp_path / "out").exists()


def history(ratios: list[float]) -> list[SharpnessMeasurement]:
    return [
        SharpnessMeasurement(i, 1.0, 5.0 * ratio, 5.0, 0.0, 1) for i, ratio in enumerate(ratios)
    ]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5] * 3 + [1.0], "at its edge"),
        ([0.5] * 4, "below its edge"),
        ([0.5, 1.0, 0.7, 0.6], "left its edge downwards"),
        ([0.5] * 3 + [1.2], "above its edge"),
        ([2.0] * 6 + [0.95, 1.05], "at its edge"),
    ],
)
def test_verdicts(ratios: list[float], expected: str) -> None:
    assert verdict(history(ratios)) == expected


def test_spent_time_is_reported(tmp_path: Path) -> None:
    results = reproduce("sharpening", tmp_path, "--budget", "1e-9")
    assert len(results["runs"]) == len(methods(1.0))
    for run in results["runs"]:
        assert run["outcome"] == "time spent: below its edge"
        assert run["step"] == 0


def test_divergence_is_reported(tmp_path: Path) -> None:
    results = reproduce("sharpening", tmp_path, "--edge", "0.01", "--steps", "500")
    assert results["runs"][0]["outcome"] == "diverged"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "PHENOMENON"),
        (["nope"], "invalid choice: 'nope'"),
        (["late", "--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
        (["late", "--activation", "sine"], "--activation: invalid choice"),
        (["late", "--edge", "0"], "--edge: must be a number above 0"),
        (["sharpening", "--steps", "0"], "--steps: must be a whole number from 1"),
    ],
)
def test_bad_arguments(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["phenomena", *argv])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["sharpening", "saddle", "late", "moving-edge"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["phenomena", name, "--help"])
    assert exit_info.value.code == 0
    assert f"out/phenomena/{name}" in capsys.readouterr().out
