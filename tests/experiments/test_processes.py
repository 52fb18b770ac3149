"""eigenfilter train under torchrun: it equals a single process, resumes, and ends cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenfilter.experiments import datasets, runs
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.trainer import Trainer
from experiments import processes_workers as workers
from experiments.test_train import assert_same, lines, stop_after, trainer_state

pytestmark = pytest.mark.distributed

WORKERS = str(Path(workers.__file__))
MAIN = "of0"  # the folder of the process that leads


def torchrun(count: int, *what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(count), *what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all scenarios in a folder that contains a run which a single process started."""
    folder = tmp_path_factory.mktemp("processes")
    config = Config(**workers.ALIKE["usam"])
    runs.run(config, folder / MAIN / "begun alone", stop=stop_after(5))
    job = torchrun(workers.WORLD, WORKERS, str(folder))
    _, output_lines = job.communicate(timeout=300)
    assert job.returncode == 0, output_lines
    return folder


def results_of(folder: Path, name: str) -> list[Any]:
    """Return the results of a scenario in each process."""
    return [torch.load(folder / f"{rank}.pt")[name] for rank in range(workers.WORLD)]


def assert_close(a: Path, b: Path) -> None:
    """Assert that two runs agree up to rounding in weights, state and log."""
    states = [trainer_state(path) for path in (a, b)]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-9, atol=1e-12)
    for one, other in zip(lines(a), lines(b), strict=True):
        assert one.pop("kind") == other.pop("kind")
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", workers.ALIKE)
def test_equal_to_a_single_process(name: str, folder: Path, tmp_path: Path) -> None:
    """The runs use augmentation, clipping, the sharpness, and ascents on a part of the batch."""
    alone = runs.run(Config(**workers.ALIKE[name]), tmp_path)
    assert_close(folder / MAIN / name, tmp_path)
    assert {record["kind"] for record in lines(tmp_path)} == {"train", "test", "sharpness"}
    for results in results_of(folder, name):
        assert results["gradients"] == alone["gradients"]
        assert results["test"] == pytest.approx(alone["test"], rel=1e-9)
        assert (results["processes"], alone["processes"]) == (workers.WORLD, 1)


@pytest.mark.parametrize("name", workers.RESUMED)
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, folder: Path) -> None:
    """One process stops the run; each dropout and the gradient buckets must be restored."""
    whole, parts = (folder / MAIN / f"{name}, {kind}" for kind in ("whole", "parts"))
    assert_same(trainer_state(whole), trainer_state(parts))
    assert lines(whole) == lines(parts)
    for results in results_of(folder, name):
        assert (results["outcome"], results["step"]) == ("stopped", 5)


@pytest.mark.parametrize("name", workers.RESUMED)
def test_evaluation_matches_the_saved_network(name: str, folder: Path) -> None:
    """Running statistics of batch normalization are equal in all processes."""
    run = f"{name}, whole"
    alone = Trainer(Config(**workers.RESUMED[name]), datasets.load("digits"), torch.device("cpu"))
    alone.load_state_dict(trainer_state(folder / MAIN / run))
    expected = pytest.approx(alone.evaluate(), rel=1e-5)
    for results in results_of(folder, run):
        assert {key: results["test"][key] for key in ("loss", "accuracy")} == expected


def test_running_statistics_are_means_over_processes(folder: Path, tmp_path: Path) -> None:
    """The test looks at the first normalization layer, before which a step has the same weights."""
    runs.run(Config(**workers.A_STEP), tmp_path)
    here, there = (trainer_state(path)["model"] for path in (tmp_path, folder / MAIN / "a step"))
    first = next(name for name in here if name.endswith("running_mean"))
    torch.testing.assert_close(here[first], there[first])


def test_dropout_differs_between_processes(folder: Path) -> None:
    """Random numbers must differ; states also differ in the unused upper half of the seed."""
    state = trainer_state(folder / MAIN / "dropout, whole")
    states = [random["cpu"] for random in (state["random"], *state["others"])]
    drawn = {float(torch.rand([], generator=torch.Generator().set_state(s))) for s in states}
    assert len(drawn) == len(states) == workers.WORLD


def test_a_run_resumes_with_another_number_of_processes(folder: Path, tmp_path: Path) -> None:
    """A run resumes from one process with three, and from three with one."""
    assert {results["step"] for results in results_of(folder, "begun alone")} == {12}
    runs.run(Config(**workers.ALIKE["usam"]), tmp_path)
    assert_close(folder / MAIN / "begun alone", tmp_path)
    last = runs.run(Config(**workers.ALIKE["usam"]), folder / MAIN / "begun by all", resume=True)
    assert last["step"] == 12
    assert_close(folder / MAIN / "begun by all", tmp_path)


def test_one_process_writes_and_observes(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["0.pt", "1.pt", "2.pt", MAIN]
    files = {path.name for path in (folder / MAIN / "usam").iterdir()}
    assert files == {"checkpoint.pt", "config.yaml", "log.jsonl", "results.json"}
    first, *others = results_of(folder, "seen")
    assert first.count("start") == len(workers.ALIKE)
    assert others == [[], []]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "batch_size",
            "batch_size gives 32 images per step, which 3 processes cannot share evenly",
        ),
        (
            "ascent_part",
            "ascent_part gives 5 images per step, which 3 processes cannot share evenly",
        ),
        ("hvp", "hvp autograd works in a single process only; set hvp to finite_difference"),
        ("sharpness", "sharpness_samples must be at least 1 for each of 3 processes"),
        ("diverged", "lower lr (9.33e+17); the checkpoint of step 1 is kept"),
        ("full disk", "checkpoint.pt: File too large; the checkpoint of step 4 is kept"),
        ("other data", "the processes have different data; copy --data-dir"),
        ("corrupt", "these data are corrupt"),
    ],
)
def test_all_processes_raise_the_same_error(name: str, says: str, folder: Path) -> None:
    messages = results_of(folder, name)
    assert says in messages[0]
    assert messages == messages[:1] * workers.WORLD


def test_a_run_resumes_after_a_full_disk(folder: Path, tmp_path: Path) -> None:
    assert trainer_state(folder / MAIN / "diverged")["step"] == 1
    assert trainer_state(folder / MAIN / "full disk")["step"] == 12


def output_lines(job: subprocess.Popen[str]) -> list[str]:
    """Return the lines that the command printed; no process may hang."""
    out, errors = job.communicate(timeout=120)
    assert errors.count("Traceback") <= 1  # torchrun's
    return [line for line in (out + errors).splitlines() if "eigenfilter train" in line]


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path) -> None:
    job = torchrun(2, "-m", "eigenfilter", "train", "--epochs=1000000", "--out", str(tmp_path))
    log = tmp_path / "log.jsonl"
    until = time.monotonic() + 120
    while not log.exists() or "test" not in log.read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    [line] = output_lines(job)
    step = trainer_state(tmp_path)["step"]
    again = f"torchrun ... -m eigenfilter train --resume --out {tmp_path}"
    assert line == f"stopped at step {step}; to continue: {again}"
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["outcome"], results["step"]) == ("stopped", step)
    config = Config(**results["config"])
    alone = runs.run(config, tmp_path, resume=True, stop=stop_after(1))
    assert alone["step"] == step + 1


@pytest.mark.slow
def test_all_fail_and_one_reports_it(tmp_path: Path) -> None:
    job = torchrun(2, "-m", "eigenfilter", "train", "--batch-size=33", "--out", str(tmp_path))
    [line] = output_lines(job)
    assert line.startswith("eigenfilter train: error: batch_size gives 33 images per step")
    assert job.returncode == 1  # torchrun's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("killed", "another process of the run ended, or cannot be reached"),
        ("out of memory", "out of memory at step 6; lower batch_size"),
    ],
)
def test_one_fails_and_none_hangs(end: str, says: str, tmp_path: Path) -> None:
    [line] = output_lines(torchrun(2, WORKERS, str(tmp_path), end))
    assert line.startswith(f"eigenfilter train: error: {says}")
    assert trainer_state(tmp_path)["step"] == 4
