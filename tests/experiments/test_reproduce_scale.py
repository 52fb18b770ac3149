"""The scale of a reproduction, by a budget or by hand, and its statement in every output."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eigenfilter.experiments import datasets
from eigenfilter.experiments.reproduce import budget, spectra_figure
from eigenfilter.experiments.reproduce.budget import Rates
from eigenfilter.experiments.reproduce.plan import ExperimentScale, Plan
from experiments.reproductions import SPECTRUM, STABLE, TINY, VARIANTS, reproduce, results


@pytest.mark.slow
def test_a_budget_is_stated_in_every_output(
    tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    # At these rates two seeds of two epochs take more than ten minutes, one of one less.
    monkeypatch.setattr(budget, "measure_rates", lambda *args: Rates(gradient=0.03, product=1e-6))
    titles: list[str] = []
    save = spectra_figure.save_png

    def record_title(figure, path: Path) -> None:
        titles.append(figure.get_suptitle())
        save(figure, path)

    monkeypatch.setattr(spectra_figure, "save_png", record_title)
    assert reproduce(tmp_path, "--budget", "10", name="fashion") == 0
    report = results(tmp_path)
    statement = report["statement"]
    assert re.match(r"scaled down to a budget of 10 minutes: 1 seed of 2, 1 epoch of 2", statement)
    assert report["plan"]["budget"] == 10
    assert report["plan"]["scale"] != report["plan"]["full"]
    assert report["plan"]["estimate"] <= 600
    assert {run["seed"] for run in report["runs"]} == {3}
    for name in ("summary.md", "report.html"):
        assert statement in (tmp_path / name).read_text()
    assert statement in capsys.readouterr().out
    assert statement in titles[0]

    assert reproduce(tmp_path, "--budget", "11", name="fashion") == 2
    assert "budget 10.0, not 11.0" in capsys.readouterr().err
    assert reproduce(tmp_path, "--budget", "10", "--epochs", "2", name="fashion") == 2
    assert "--budget chooses the scale itself" in capsys.readouterr().err


FULL = ExperimentScale(seeds=3, epochs=8, model="mlp-8", samples=800, spectrum=SPECTRUM)
RATES = {"mlp-8": Rates(0.02, 1e-5), "mlp-4": Rates(0.01, 1e-5)}


def test_a_smaller_budget_takes_seeds_then_epochs_then_width_then_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "START", 0.0)

    def scale(minutes: float) -> ExperimentScale:
        scale, seconds, rates = budget.fit_to_budget(
            TINY, FULL, minutes, RATES.__getitem__, processes=2, tests=0
        )
        assert rates is RATES[scale.model]
        assert seconds <= 60 * minutes
        return scale

    # The 14 variants take 32 gradients an image.
    need = 32 * 800 * 0.02 / 2 / 60 / budget.TRAINING  # minutes of one epoch of one seed
    assert scale(24.01 * need) == FULL
    assert scale(23.99 * need) == replace(FULL, seeds=2)
    assert scale(8.01 * need) == replace(FULL, seeds=1)
    assert scale(7.99 * need) == replace(FULL, seeds=1, epochs=4)
    assert scale(0.99 * need) == replace(FULL, seeds=1, epochs=1, model="mlp-4")
    assert scale(0.26 * need) == replace(FULL, seeds=1, epochs=1, model="mlp-4", samples=400)


def test_a_seed_takes_its_longest_run_and_a_start_at_least() -> None:
    def estimate(processes: int) -> float:
        _, seconds, _ = budget.fit_to_budget(
            TINY, FULL, 1e6, RATES.__getitem__, processes=processes, tests=0
        )
        return seconds

    gradient = 8 * 800 * 0.02  # of all epochs
    products = 3 * VARIANTS * 1e-5 * SPECTRUM.samples * SPECTRUM.products
    for processes, gradients in ((1, 32), (2, 16), (14, 3), (1000, 3)):
        expected = 3 * (budget.START + gradients * gradient) + products
        assert estimate(processes) == pytest.approx(expected)


def test_a_budget_that_suffices_for_nothing_says_what_would(
    tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "measure_rates", lambda *args: Rates(gradient=1.0, product=1e-6))
    assert reproduce(tmp_path, "--budget", "0.5", name="fashion") == 2
    assert re.search(r"--budget 0.5 is too small: .* takes about \d+", capsys.readouterr().err)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.slow
def test_the_rates_are_those_of_steps_and_products(tiny) -> None:
    data = datasets.load("digits")
    device = torch.device("cpu")
    small = budget.measure_rates(STABLE, STABLE.full, "mlp-8", data, device)
    large = budget.measure_rates(STABLE, STABLE.full, "mlp-2000-2000", data, device)
    assert 0 < small.gradient < large.gradient < 1
    assert 0 < small.product < large.product < 1


@pytest.mark.slow
def test_a_scale_by_hand_is_stated_in_every_output_and_kept(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = ["--seeds", "1", "--epochs", "1", "--model", "mlp-4", "--samples", "150"]
    assert reproduce(tmp_path, *scale, "--spectrum-samples", "50", name="fashion") == 0
    report = results(tmp_path)
    assert report["statement"] == (
        "scaled by hand: 1 seed of 2, 1 epoch of 2, mlp-4 in place of mlp-8, 150 of 200 "
        "training images, spectra on 50 images, 1 eigenvalue, 1 probe of 5 products "
        "(in full 60, 3, 1 of 8)"
    )
    assert report["plan"]["budget"] is None
    assert {run["seed"] for run in report["runs"]} == {3}
    for name in ("summary.md", "report.html"):
        assert report["statement"] in (tmp_path / name).read_text()

    capsys.readouterr()
    assert reproduce(tmp_path, *scale, name="fashion") == 2  # with other spectra
    assert "contains a reproduction scaled by hand: 1 seed of 2" in capsys.readouterr().err


def test_a_scale_above_the_experiments_is_not_said_to_be_a_part_of_it() -> None:
    plan = Plan("mnist", 0, None, FULL, replace(FULL, seeds=5, epochs=9))
    assert plan.statement == "scaled by hand: 5 seeds in place of 3, 9 epochs in place of 8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "5", "--epochs", "1"], "--budget chooses the scale itself"),
        (["--budget", "5", "--spectrum-samples", "50"], "--budget chooses the scale itself"),
        (["--model", "lstm"], "--model must be mlp"),
        (["--samples", "201"], "--samples must be at most 200, not 201"),
    ],
)
def test_a_scale_that_cannot_be_is_one_line_and_leaves_no_plan(
    arguments: list[str], message: str, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()
