"""The examples run, and give the expected results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_torchrun(*arguments: str) -> list[list[float]]:
    """Run the example in two processes; return the elements and eigenvalues that each prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(EXAMPLES / "curvature_torchrun.py")
    process = subprocess.run(
        [*launcher, "--nproc-per-node", "2", script, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    pattern = r"process \d: ([\d,]+) of 1,893 elements per vector; eigenvalues((?: \d\.\d{3}){3})"
    matches = re.findall(pattern, process.stdout)
    return [[float(n.replace(",", "")), *map(float, values.split())] for n, values in matches]


@pytest.mark.distributed
@pytest.mark.slow
def test_curvature_under_torchrun() -> None:
    whole, sliced = run_torchrun(), run_torchrun("--fsdp")
    assert [elements for elements, *_ in whole] == [1893, 1893]
    assert sum(elements for elements, *_ in sliced) == 1893
    (_, *values), (_, *others) = whole
    assert values == others
    assert len(values) == 3
    for _, *eigenvalues in sliced:
        assert eigenvalues == pytest.approx(values, abs=2e-3)


@pytest.mark.slow
def test_lora_with_sam_ends_flatter(tmp_path: Path) -> None:
    for package in ("transformers", "accelerate", "peft", "matplotlib"):
        pytest.importorskip(package)
    tiny = ["--first-steps", "30", "--steps", "15", "--samples", "32", "--rho", "0.3"]
    tiny += ["--every", "6", "--figure", str(tmp_path / "sharpness.png")]
    script = str(EXAMPLES / "transformers_lora.py")
    process = subprocess.run(
        [sys.executable, script, *tiny], check=True, capture_output=True, text=True
    )
    runs = re.findall(r"^AdamW.*: loss (\d\.\d+), sharpness (\d+\.\d+)$", process.stdout, re.M)
    (loss, sharpness), (loss_of_sam, sharpness_of_sam) = [tuple(map(float, run)) for run in runs]
    assert loss_of_sam == pytest.approx(loss, abs=0.1)
    assert 0 < sharpness_of_sam < 0.8 * sharpness
    assert re.findall(r"^  step (\d+): sharpness \d", process.stdout, re.M) == ["6", "12"]
    assert (tmp_path / "sharpness.png").stat().st_size > 10_000


def row(sharpness: float, gradients: float, **options: Any) -> dict[str, Any]:
    """Return a row of a sweep over four seeds; the standard error of the sharpness is 0.1."""
    usual = {"optimizer": "usam", "rho_schedule": "constant", "rho_start": 0.5, "rho_every": 1}
    means = {
        "sharpness": (sharpness, 0.2),
        "gradients": (gradients, 0.0),
        "test accuracy": (0.9, 0.01),
    }
    return {
        "options": usual | {"ascent_part": 1.0} | options,
        "runs": 4,
        "complete": 4,
        "measures": {k: {"mean": m, "deviation": d, "n": 4} for k, (m, d) in means.items()},
    }


def test_flat_for_less(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(3.0, 200),
        row(3.2, 110, rho_schedule="late", rho_start=0.6, ascent_part=0.25),
        row(5.0, 100, optimizer="sgd"),
        row(1.0, 150, rho_schedule="every", rho_every=2) | {"complete": 3},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"table": rows}))
    script = EXAMPLES / "flat_for_less.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    lines = (tmp_path / "flat_for_less.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| SGD", "1.000", "5.00 ± 0.10", "0 ± 0"],
        # (1 - 0.9) 0.1, 0.9 0.1 and 0.1 over 2
        ["| last 40%, 0.25 of the batch", "1.100", "3.20 ± 0.10", "90 ± 7"],
        ["| USAM", "2.000", "3.00 ± 0.10", "100 ± 0"],
    ]
    assert (tmp_path / "flat_for_less.png").stat().st_size > 0


def run_lightning(*arguments: str) -> dict[str, tuple[float, float]]:
    """Run the example; return the sharpness and the accuracy that each run prints."""
    pytest.importorskip("lightning.pytorch")
    pytest.importorskip("sklearn")
    script = str(EXAMPLES / "lightning_cifar10.py")
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", script, "--quiet", *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    pattern = r"^(\w+): sharpness ([\d.]+), test accuracy ([\d.]+)$"
    matches = re.findall(pattern, printed, re.MULTILINE)
    return {name: (float(sharpness), float(accuracy)) for name, sharpness, accuracy in matches}


@pytest.mark.slow
def test_lightning_on_digits() -> None:
    results = run_lightning("--dataset", "digits", "--accumulate", "2")
    assert list(results) == ["SGD", "USAM"]
    assert results["USAM"][0] < 0.9 * results["SGD"][0]
    assert min(accuracy for _, accuracy in results.values()) > 0.95


@pytest.mark.data
@pytest.mark.slow
def test_lightning_on_cifar10() -> None:
    small = "--images", "256", "--epochs", "1", "--width", "8", "--curvature-images", "64"
    results = run_lightning(*small, "--clip", "1.0", "--precision", "bf16-mixed")
    assert results["SGD"] != results["USAM"]
    assert min(sharpness for sharpness, _ in results.values()) > 0


@pytest.mark.slow
def test_lightning_explains_itself() -> None:
    pytest.importorskip("lightning.pytorch")
    script = EXAMPLES / "lightning_cifar10.py"
    done = subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True)
    assert b"--accumulate" in done.stdout


@pytest.mark.slow
def test_sharpness_control_writes_figure_and_table(tmp_path: Path) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    script = str(EXAMPLES / "sharpness_control.py")
    small = ["--problems", "digits", "--seeds", "1", "--scale", "0.15"]
    subprocess.run([sys.executable, script, str(tmp_path), *small], check=True, capture_output=True)
    text = (tmp_path / "sharpness_control.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| digits")]
    assert [row.split(" | ")[1] for row in rows] == ["controlled", "constant e", "e = 0"]
    assert (tmp_path / "sharpness_control.png").stat().st_size > 0
    [run, *_] = json.loads((tmp_path / "sharpness_control.json").read_text())["digits"]
    assert len(run["steps"]) == 45
    assert run["e"][-1] > run["e"][0] > 0.0


@pytest.mark.slow
def test_one_gradient_trains_every_method(tmp_path: Path) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    study = [sys.executable, str(EXAMPLES / "one_gradient"), str(tmp_path), "--short"]
    study += ["--problems", "gpt", "--processes", "1"]
    subprocess.run(study, check=True, capture_output=True)
    runs = [json.loads(line) for line in (tmp_path / "short.jsonl").read_text().splitlines()]
    gradients = {run["method"]: run["gradients"] for run in runs if run["final"]}
    twice = {"usam": 2.0, "sam": 2.0, "late": 1.4, "every": 1.5}
    assert gradients == {method: twice.get(method, 1.0) for method in gradients}
    rows = (tmp_path / "one_gradient.md").read_text().splitlines()[4:]
    assert len(rows) == len(gradients) == 13
    assert (tmp_path / "one_gradient.png").stat().st_size > 0
    again = subprocess.run(study, check=True, capture_output=True, text=True)
    assert again.stdout == ""  # nothing is run twice


@pytest.mark.slow
def test_compressed_state_trains_every_format(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    study = [sys.executable, str(EXAMPLES / "compressed_state.py"), str(tmp_path), "--short"]
    study += ["--methods", "adamw", "--seeds", "2", "--processes", "1"]
    subprocess.run(study, check=True, capture_output=True)
    records = [json.loads(line) for line in (tmp_path / "short.jsonl").read_text().splitlines()]
    runs = {(run["format"], run["seed"]): run for run in records}
    sizes = {form: run["bytes per parameter"] for (form, _), run in runs.items()}
    # A parameter, its correction, and two moments: 8 bits of one are 1 + 4 / 64 bytes.
    assert sizes == pytest.approx(
        {
            "float32": 4 + 8,
            "state8": 4 + 2.125,
            "master24_state8": 2 + 1 + 2.125,
            "master24": 2 + 1 + 4,
            "bfloat16": 2 + 4,
            "stochastic": 2 + 4,
            "nearest": 4 + 8,
        },
        abs=0.01,
    )
    first = {form: runs[form, 1]["losses"][0] for form in sizes}
    alike = [("float32", "state8", "nearest"), ("master24_state8", "master24")]
    alike += [("bfloat16", "stochastic")]  # of the same parameters on the same batch
    assert [len({first[form] for form in forms}) for forms in alike] == [1, 1, 1]
    assert len(set(first.values())) == 3
    assert first["bfloat16"] == pytest.approx(first["float32"], rel=1e-2)
    assert first["master24"] == pytest.approx(first["float32"], rel=1e-2)
    table = (tmp_path / "compressed_state.md").read_text().splitlines()
    assert len(table) == 4 + len(sizes)
    assert (tmp_path / "compressed_state.png").stat().st_size > 0
    again = subprocess.run(study, check=True, capture_output=True, text=True)
    assert again.stdout == ""  # nothing is run twice


@pytest.mark.slow
def test_the_spectrum_of_gpt2_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    for package in ("transformers", "tokenizers", "matplotlib"):
        pytest.importorskip(package)
    (tmp_path / "text.txt").write_text("".join(topics[name] for name in sorted(topics)))
    options = ["--text", str(tmp_path / "text.txt"), "--shape", "tiny", "--steps", "20"]
    options += ["--batch", "4", "--length", "32", "--pairs", "3", "--density-steps", "6"]

    def command(folder: str) -> list[str]:
        return [sys.executable, str(EXAMPLES / "gpt2_spectrum"), str(tmp_path / folder), *options]

    def products(output: str) -> list[int]:
        return [int(n) for n in re.findall(r"^eigenpairs: product (\d+)", output, re.M)]

    with subprocess.Popen(command("stopped"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        any("product 7," in line for line in process.stdout)
        process.kill()
    runs = [
        subprocess.run(command(folder), check=True, capture_output=True, text=True).stdout
        for folder in ("stopped", "whole")
    ]
    first = products(runs[0])[0]
    assert first in (8, 9)  # one more may have been under way
    assert products(runs[0]) == products(runs[1])[first - 1 :]

    stopped, whole = (
        json.loads((tmp_path / folder / "results.json").read_text())
        for folder in ("stopped", "whole")
    )
    for key in ("values", "residuals", "products"):
        assert stopped["eigenpairs"][key] == whole["eigenpairs"][key]
    for key in ("nodes", "weights"):
        assert [d[key] for d in stopped["densities"]] == [d[key] for d in whole["densities"]]

    options[options.index("--pairs") + 1] = "2"
    refused = subprocess.run(command("whole"), check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "is of other settings" in refused.stderr.splitlines()[-1]
