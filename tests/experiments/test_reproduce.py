"""The paper's experiments on digits: every number is checked against the folders of the runs."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import statistics
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from eigenfilter.experiments.cli import main
from eigenfilter.experiments.reproduce import LOCK, pipeline, spectra, summary
from eigenfilter.experiments.reproduce.findings import Findings
from eigenfilter.experiments.reproduce.outputs import FILES
from eigenfilter.experiments.reproduce.plan import Plan
from eigenfilter.experiments.reproduce.summary import RunResult, group_runs
from eigenfilter.experiments.sweep.folders import try_folder_lock
from experiments.reproductions import (
    DIVERGING,
    SPECTRUM,
    VARIANTS,
    reproduce,
    results,
)
from experiments.test_spectrum import dense


@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    assert reproduce(folder) == 0
    return folder


@pytest.mark.slow
def test_every_run_is_there_with_the_numbers_of_its_folder(out: Path) -> None:
    report = results(out)
    assert report["complete"]
    assert len(report["runs"]) == 2 * VARIANTS
    assert {run["seed"] for run in report["runs"]} == {3, 4}
    for run in report["runs"]:
        folder = out / "runs" / run["name"]
        record = json.loads((folder / "results.json").read_text())
        config = record["config"]
        assert (run["method"], run["momentum"]) == (config["optimizer"], config["momentum"])
        if run["rho"] == DIVERGING:
            assert run["outcome"] == "diverged"
            assert run["accuracy"] is run["sharpness"] is run["ratio"] is None
            continue
        assert run["accuracy"] == record["test"]["accuracy"]
        steps = 2 * 4
        assert run["gradients"] == steps * {"sgd": 1, "sam": 2, "usam": 2}.get(run["method"], 3)
        spectrum = json.loads((folder / "spectrum.json").read_text())
        assert run["sharpness"] == max(spectrum["values"])
        if run["method"] == "sam":
            assert run["edge"] is run["ratio"] is None
        else:
            assert run["ratio"] == pytest.approx(run["sharpness"] / run["edge"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd-momentum0-seed3", "usam-momentum0.9-rho0.1-seed4"])
def test_the_sharpness_is_that_of_the_dense_hessian(out: Path, name: str) -> None:
    exact = float(dense(out / "runs" / name, SPECTRUM.samples)[0])
    [run] = [run for run in results(out)["runs"] if run["name"] == name]
    assert abs(run["sharpness"] - exact) <= run["error"] + 1e-5 * exact  # float32 besides


@pytest.mark.slow
def test_means_deviations_and_the_best_rho(out: Path) -> None:
    report = results(out)
    assert len(report["rows"]) == VARIANTS
    for row in report["rows"]:
        runs = [
            run
            for run in report["runs"]
            if all(run[key] == row[key] for key in ("method", "momentum", "rho"))
        ]
        assert len(runs) == 2
        if row["rho"] == DIVERGING:
            assert row["note"] == "2 of 2 diverged"
            assert row["accuracy"] is row["sharpness"] is None
            assert not row["best"]
            continue
        for key in ("accuracy", "sharpness", "gradients", "seconds"):
            values = [run[key] for run in runs]
            assert row[key]["value"] == pytest.approx(sum(values) / 2, rel=1e-12)
            assert row[key]["deviation"] == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert row["error"] == max(run["error"] for run in runs)
        rivals = [
            other["accuracy"]["value"]
            for other in report["rows"]
            if (other["method"], other["momentum"]) == (row["method"], row["momentum"])
            and other["accuracy"]
        ]
        if row["best"]:
            assert row["accuracy"]["value"] == max(rivals)
    best = [(row["method"], row["momentum"]) for row in report["rows"] if row["best"]]
    assert len(best) == len(set(best)) == 10


@pytest.mark.slow
def test_the_order_is_stated_from_the_numbers(out: Path) -> None:
    report = results(out)
    sharpness = {
        (run["method"], run["momentum"], run["rho"], run["seed"]): run["sharpness"]
        for run in report["runs"]
    }
    [check] = [
        check
        for check in report["checks"]
        if check["momentum"] == 0.9
        and check["flatter"] == "USAM (rho 0.1)"
        and "0.1" in check["at"]
    ]
    count_held = sum(
        sharpness["sgd", 0.9, None, seed] > sharpness["usam", 0.9, 0.1, seed] for seed in (3, 4)
    )
    assert (check["held"], check["seeds"]) == (count_held, 2)
    assert check["verdict"] == {2: "as claimed", 1: "not in every seed", 0: "reversed"}[count_held]
    assert check["verdict"] in check["sentence"]
    # SGD > USAM at the best and two radii, USAM > two-step and > Hessian at the best and one.
    assert len(report["checks"]) == 2 * (3 + 2 + 2)
    for line, count in zip(report["verdicts"], (6, 4, 4), strict=True):
        assert f"of {count} comparisons" in line
        assert sum(int(n) for n in re.findall(r" in (\d+)", line)) == count


@pytest.mark.slow
def test_every_output_says_what_diverged_and_that_it_was_in_full(out: Path) -> None:
    for name in FILES:
        assert (out / name).stat().st_size > 1000
    for name in ("summary.md", "report.html"):
        text = (out / name).read_text()
        assert "in full; 28 runs with 2 seeds, 24 complete, 4 diverged" in text
        assert "hessian_usam-momentum0-rho1e+30-seed3: diverged: the loss of step" in text
        for row in summary.table(group_runs([measured(run) for run in results(out)["runs"]])):
            for cell in row:
                assert cell in text


def measured(run: dict) -> RunResult:
    values = {key: value for key, value in run.items() if key != "ratio"}
    return RunResult(**values, spectrum=None)


@pytest.mark.slow
def test_run_again_it_reads_what_is_there(out: Path) -> None:
    files = sorted((out / "runs").rglob("*"))
    before = results(out), [path.stat().st_mtime_ns for path in files if path.is_file()]
    assert reproduce(out) == 0
    assert sorted((out / "runs").rglob("*")) == files
    after = results(out), [path.stat().st_mtime_ns for path in files if path.is_file()]
    assert 0 < before[0].pop("seconds") < after[0].pop("seconds")  # of all commands
    assert before == after


@pytest.mark.slow
def test_what_was_measured_is_read_though_stopped_at_once(out: Path) -> None:
    plan = Plan.of(json.loads((out / "plan.json").read_text()))
    options = {"processes": 1, "data_dir": None, "device": "cpu", "stop": lambda: True}
    report = [run.as_dict() for run in pipeline.execute(plan, out, **options)]
    assert report == results(out)["runs"]

    finer = replace(plan.scale, spectrum=replace(SPECTRUM, steps=9))  # not measured yet
    for run, before in zip(
        pipeline.execute(replace(plan, scale=finer), out, **options), report, strict=True
    ):
        assert run.outcome == {"complete": "unfinished"}.get(before["outcome"], before["outcome"])
        assert (run.accuracy, run.sharpness) == (before["accuracy"], None)


@pytest.mark.slow
def test_memory_that_does_not_suffice_is_an_error_of_its_run(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(out, tmp_path / "copy")
    name = "usam-momentum0-rho0.1-seed3"
    spectrum = folder / "runs" / name / "spectrum.json"
    spectrum.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(spectra.curvature, "eigsh", mock.Mock(side_effect=torch.OutOfMemoryError))
        assert reproduce(folder) == 1
    report = results(folder)
    [run] = [run for run in report["runs"] if run["name"] == name]
    assert (run["outcome"], run["sharpness"]) == ("complete", None)
    assert run["accuracy"] is not None
    for file in ("summary.md", "report.html"):
        text = (folder / file).read_text()
        assert "Complete, but without a spectrum" in text
        assert f"{name}: out of memory" in text
    assert not spectrum.exists()
    assert reproduce(folder) == 0  # measured again
    same = [run["sharpness"] for run in results(folder)["runs"]]
    assert same == [run["sharpness"] for run in results(out)["runs"]]


def test_only_one_is_at_work_in_a_folder(tiny, tmp_path: Path, capsys) -> None:
    with try_folder_lock(tmp_path, wait=lambda: False, name=LOCK) as acquired:
        assert acquired
        assert reproduce(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"another reproduction is at work in {tmp_path}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ({0.1: (0.8, 0.7, None), 0.2: (0.7, 0.6, 0.99)}, 0.1),  # over the first two seeds
        ({0.1: (0.8, 0.7, None), 0.2: (0.9, None, None)}, 0.2),
        ({0.1: (0.8, None, None), 0.2: (None, None, None)}, None),  # nothing to compare over
        ({0.1: (0.8, 0.7, "diverged"), 0.2: (0.7, 0.6, None)}, 0.2),
        ({0.1: (0.8, 0.7, "failed"), 0.2: (0.7, None, None)}, 0.2),
    ],
)
def test_unfinished_runs_do_not_disqualify_a_radius(
    accuracies: dict[float, tuple[float | str | None, ...]], best: float | None
) -> None:
    runs = []
    for rho, values in accuracies.items():
        for seed, value in enumerate(values):
            run = dict.fromkeys(field.name for field in fields(RunResult))
            run |= {"method": "usam", "momentum": 0.0, "rho": rho, "seed": seed, "note": ""}
            accuracy = None if isinstance(value, str) else value
            outcome = "unfinished" if value is None else "complete" if accuracy else value
            runs.append(RunResult(**run | {"accuracy": accuracy, "outcome": outcome}))
    assert [row.rho for row in group_runs(runs) if row.best] == ([] if best is None else [best])


@pytest.mark.slow
def test_what_was_stopped_goes_on_to_the_same_numbers(out: Path, tmp_path: Path) -> None:
    plan = Plan.of(json.loads((out / "plan.json").read_text()))
    plan = replace(plan, experiment="fashion", scale=replace(plan.scale, seeds=1))
    options = {"processes": 1, "data_dir": None, "device": "cpu"}
    glob = tmp_path.glob
    first = pipeline.execute(
        plan, tmp_path, stop=lambda: len(list(glob("runs/*/results.json"))) >= 2, **options
    )
    assert [run.outcome for run in first].count("unfinished") >= VARIANTS - 5
    findings = Findings.of(plan, first, 0.0)
    assert not findings.complete
    assert "unfinished" in findings.title
    again = pipeline.execute(plan, tmp_path, stop=lambda: False, **options)
    whole = {run["name"]: run for run in results(out)["runs"]}
    for run in again:
        there = whole[run.name]
        assert (run.outcome, run.accuracy) == (there["outcome"], there["accuracy"])
        assert run.sharpness == there["sharpness"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "invalid choice: 'cifar'"),
        (["mnist", "--budget", "0"], "must be a number above 0"),
        (["mnist", "--seed", "-1"], "must be a whole number"),
        (["mnist", "--device", "tpu"], "tpu is not a device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["reproduce", *arguments, "--out", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


# The page, in a browser.

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

ACT = """
const svg = document.querySelector("figure.zoom svg");
const box = () => svg.getAttribute("viewBox").split(" ").map(Number);
const seen = { whole: box(), drawn: svg.getBoundingClientRect().width };
const at = svg.getBoundingClientRect();
const middle = {  // the browser rounds places to pixels
  clientX: Math.round(at.left + at.width / 4),
  clientY: Math.round(at.top + at.height / 3),
  bubbles: true,
};
seen.at = [(middle.clientX - at.left) / at.width, (middle.clientY - at.top) / at.height];
const buttons = document.querySelectorAll("figure.zoom button");
buttons[0].click();
seen.button = box();
buttons[2].click();
const wheel = { ...middle, deltaY: -400, cancelable: true };
seen.scrolls = svg.dispatchEvent(new WheelEvent("wheel", wheel));
seen.scrolled = box();
svg.dispatchEvent(new WheelEvent("wheel", { ...wheel, ctrlKey: true }));
seen.wheel = box();
svg.dispatchEvent(new PointerEvent("pointerdown", middle));
window.dispatchEvent(new PointerEvent("pointermove", { ...middle, clientX: middle.clientX - 30 }));
window.dispatchEvent(new PointerEvent("pointerup", middle));
window.dispatchEvent(new PointerEvent("pointermove", middle));
svg.dispatchEvent(new PointerEvent("pointerdown", middle));
window.dispatchEvent(new PointerEvent("pointercancel", middle));
window.dispatchEvent(new PointerEvent("pointermove", { ...middle, clientX: middle.clientX - 30 }));
seen.dragged = box();
svg.dispatchEvent(new MouseEvent("dblclick", middle));
seen.reset = box();
seen.curves = svg.querySelectorAll("path").length;
seen.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
const image = new Image();
image.onerror = () => {
  seen.blocked = true;
  document.body.dataset.seen = JSON.stringify(seen);
};
image.src = "http://127.0.0.1:1/picture.png";
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome on the PATH")
def test_the_page_in_a_browser(out: Path, tmp_path: Path) -> None:
    page = (out / "report.html").read_text()
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # the names of formats, which nothing is fetched from
    acted = tmp_path / "acted.html"
    acted.write_text(page.replace("</body>", f"<script>{ACT}</script></body>"))
    document = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--window-size=1200,900",
            "--dump-dom",
            acted.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    measurements = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', document).group(1)))
    whole, button, wheel, dragged = (
        measurements[k] for k in ("whole", "button", "wheel", "dragged")
    )
    assert measurements["drawn"] > 500
    assert measurements["curves"] > 100
    assert button[2:] == pytest.approx([0.8 * whole[2], 0.8 * whole[3]])
    assert button[0] == pytest.approx(0.1 * whole[2])
    shrunk = math.exp(-0.6)
    # Without Ctrl the wheel scrolls the page.
    assert (measurements["scrolls"], measurements["scrolled"]) == (True, whole)
    assert wheel[2:] == pytest.approx([shrunk * whole[2], shrunk * whole[3]])
    under = [(1 - shrunk) * u * n for u, n in zip(measurements["at"], whole[2:], strict=True)]
    assert wheel[:2] == pytest.approx(under)  # what is under the pointer stays there
    assert dragged[0] == pytest.approx(wheel[0] + 30 * wheel[2] / measurements["drawn"])
    assert dragged[1:] == pytest.approx(wheel[1:])
    assert measurements["reset"] == whole
    assert measurements["fetched"] == []
    assert measurements["blocked"]
    for row in ("hessian_usam-momentum0", "Limits", "two-step USAM"):
        assert row in document
