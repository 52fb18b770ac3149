"""eigenfilter train under torchrun: it equals a single process, resumes, and ends cleanly.

torchrun starts this file as a program, too. With a folder it runs all scenarios in each process and
writes their results to FOLDER/RANK.pt. With the folder and an end, it runs `eigenfilter train`, of
which one process ends in this way.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from eigenfilter.experiments import datasets, runs
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.processes import Processes, init_distributed
from eigenfilter.experiments.trainer import Trainer
from experiments.test_train import assert_same, lines, stop_after, trainer_state

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MAIN = "of0"  # the folder of the process that leads
WORLD = 3
SMALL: dict[str, Any] = {
    "samples": 100,
    "batch_size": 24,
    "model": "mlp-12-9",
    "epochs": 3,
    "log_every": 5,
    "lr": 0.05,
    "threads": 1,
}


class Job(NamedTuple):
    """One process of the job that runs the scenarios."""

    rank: int
    processes: Processes
    folder: Path  # its own: only that of the main process may be created

    def train(self, name: str, options: dict[str, Any], **others: Any) -> Any:
        return runs.run(Config(**options), self.folder / name, processes=self.processes, **others)


def torchrun(count: int, *what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
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
    config = Config(**ALIKE["usam"])
    runs.run(config, folder / MAIN / "begun alone", stop=stop_after(5))
    job = torchrun(WORLD, __file__, str(folder))
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    return folder


def results_of(folder: Path, name: str) -> list[Any]:
    """Return the results of a scenario in each process."""
    return [torch.load(folder / f"{rank}.pt")[name] for rank in range(WORLD)]


def assert_close(a: Path, b: Path) -> None:
    """Assert that two runs agree up to rounding in weights, state and log."""
    states = [trainer_state(path) for path in (a, b)]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-9, atol=1e-12)
    for one, other in zip(lines(a), lines(b), strict=True):
        assert one.pop("kind") == other.pop("kind")
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


EXACT = SMALL | {
    "precision": "float64",
    "activation": "tanh",
    "crop": 1,
    "flip": True,
    "cutout": 2,
    "clip": 0.5,
    "sharpness_every": 4,
    "sharpness_samples": 20,
}
ALIKE: dict[str, dict[str, Any]] = {
    "sgd": EXACT | {"optimizer": "sgd"},
    "usam": EXACT | {"optimizer": "usam", "ascent_part": 0.5, "rho": 0.2},
    "sam": EXACT | {"optimizer": "adamw", "method": "sam", "lr": 0.01},
    "full batch": EXACT | {"optimizer": "two_step_usam", "samples": 48, "batch_size": 0},
}


def train_alike(job: Job) -> dict[str, Any]:
    events: list[str] = []
    observed = {"observe": lambda kind, step, record: events.append(kind)}
    results = {name: job.train(name, options, **observed) for name, options in ALIKE.items()}
    return results | {"events": events}


@pytest.mark.parametrize("name", ALIKE)
def test_equal_to_a_single_process(name: str, folder: Path, tmp_path: Path) -> None:
    """The runs use augmentation, clipping, the sharpness, and ascents on a part of the batch."""
    alone = runs.run(Config(**ALIKE[name]), tmp_path)
    assert_close(folder / MAIN / name, tmp_path)
    assert {record["kind"] for record in lines(tmp_path)} == {"train", "test", "sharpness"}
    for results in results_of(folder, name):
        assert results["gradients"] == alone["gradients"]
        assert results["test"] == pytest.approx(alone["test"], rel=1e-9)
        assert (results["processes"], alone["processes"]) == (WORLD, 1)


def test_one_process_writes_and_observes(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["0.pt", "1.pt", "2.pt", MAIN]
    files = {path.name for path in (folder / MAIN / "usam").iterdir()}
    assert files == {"checkpoint.pt", "config.yaml", "log.jsonl", "results.json"}
    first, *others = results_of(folder, "events")
    assert first.count("start") == len(ALIKE)
    assert others == [[], []]


RESUMED: dict[str, dict[str, Any]] = {
    "dropout": SMALL | {"dropout": 0.3, "crop": 1, "sharpness_every": 4, "sharpness_samples": 20},
    "batch norm": SMALL
    | {"model": "wrn-10-1", "samples": 48, "epochs": 4, "sharpness_every": 5}
    | {"sharpness_samples": 20, "optimizer": "sgd"},
}


def train_in_parts(job: Job) -> dict[str, Any]:
    results = {}
    for name, options in RESUMED.items():
        results[f"{name}, whole"] = job.train(f"{name}, whole", options)
        stop = stop_after(5) if job.rank == 1 else lambda: False  # one says so, and all stop
        results[name] = job.train(f"{name}, parts", options, stop=stop)
        job.train(f"{name}, parts", options, resume=True)
    return results


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, folder: Path) -> None:
    """One process stops the run; each dropout and the gradient buckets must be restored."""
    whole, parts = (folder / MAIN / f"{name}, {kind}" for kind in ("whole", "parts"))
    assert_same(trainer_state(whole), trainer_state(parts))
    assert lines(whole) == lines(parts)
    for results in results_of(folder, name):
        assert (results["outcome"], results["step"]) == ("stopped", 5)


@pytest.mark.parametrize("name", RESUMED)
def test_evaluation_matches_the_saved_network(name: str, folder: Path) -> None:
    """Running statistics of batch normalization are equal in all processes."""
    run = f"{name}, whole"
    alone = Trainer(Config(**RESUMED[name]), datasets.load("digits"), torch.device("cpu"))
    alone.load_state_dict(trainer_state(folder / MAIN / run))
    expected = pytest.approx(alone.evaluate(), rel=1e-5)
    for results in results_of(folder, run):
        assert {key: results["test"][key] for key in ("loss", "accuracy")} == expected


def test_dropout_differs_between_processes(folder: Path) -> None:
    """Random numbers must differ; states also differ in the unused upper half of the seed."""
    state = trainer_state(folder / MAIN / "dropout, whole")
    states = [random["cpu"] for random in (state["random"], *state["others"])]
    drawn = {float(torch.rand([], generator=torch.Generator().set_state(s))) for s in states}
    assert len(drawn) == len(states) == WORLD


def begin_and_resume(job: Job) -> dict[str, Any]:
    result = job.train("begun alone", ALIKE["usam"], resume=True)
    job.train("begun by all", ALIKE["usam"], stop=stop_after(5))
    return {"begun alone": result}


def test_a_run_resumes_with_another_number_of_processes(folder: Path, tmp_path: Path) -> None:
    """A run resumes from one process with three, and from three with one."""
    assert {results["step"] for results in results_of(folder, "begun alone")} == {12}
    runs.run(Config(**ALIKE["usam"]), tmp_path)
    assert_close(folder / MAIN / "begun alone", tmp_path)
    last = runs.run(Config(**ALIKE["usam"]), folder / MAIN / "begun by all", resume=True)
    assert last["step"] == 12
    assert_close(folder / MAIN / "begun by all", tmp_path)


A_STEP = SMALL | {"model": "wrn-10-1", "samples": 24, "epochs": 1}


def train_a_step(job: Job) -> dict[str, Any]:
    job.train("a step", A_STEP)
    return {}


def test_running_statistics_are_means_over_processes(folder: Path, tmp_path: Path) -> None:
    """The test looks at the first normalization layer, before which a step has the same weights."""
    runs.run(Config(**A_STEP), tmp_path)
    here, there = (trainer_state(path)["model"] for path in (tmp_path, folder / MAIN / "a step"))
    first = next(name for name in here if name.endswith("running_mean"))
    torch.testing.assert_close(here[first], there[first])


REFUSED: dict[str, dict[str, Any]] = {
    "batch_size": SMALL | {"batch_size": 32},
    "ascent_part": SMALL | {"ascent_part": 0.2},
    "hvp": SMALL | {"optimizer": "hessian_usam", "hvp": "autograd"},
    "sharpness": SMALL | {"sharpness_every": 1, "sharpness_samples": 2},
    "diverged": SMALL | {"optimizer": "sgd", "lr": 1e18, "log_every": 1, "checkpoint_every": 1},
}


def refusal(call: Callable[[], object]) -> str:
    """Return the message of its UserError."""
    try:
        call()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def refuse(job: Job) -> dict[str, Any]:
    results = {name: refusal(lambda n=name: job.train(n, REFUSED[n])) for name in REFUSED}
    results["other data"] = refusal(lambda: train_on_other_data(job))
    results["corrupt"] = refusal(lambda: job.processes.main_process_first(lambda: corrupt(job)))
    return results


def train_on_other_data(job: Job) -> None:
    """Give each process a different label."""
    data = datasets.load("digits")
    data.labels[0] = job.rank
    with mock.patch.object(datasets, "load", return_value=data):
        job.train("other data", SMALL)


def corrupt(job: Job) -> None:
    if job.rank == 1:
        raise UserError("these data are corrupt")


def train_on_a_full_disk(job: Job) -> dict[str, Any]:
    """Fill the disk of the main process from the first checkpoint on; then resume."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = SMALL | {"checkpoint_every": 4}

    def fill(kind: str, step: int, record: dict[str, Any]) -> None:
        if kind == "checkpoint":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limit[1]))

    try:
        message = refusal(lambda: job.train("full disk", options, observe=fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    job.train("full disk", options, resume=True)
    return {"full disk": message}


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
    assert messages == messages[:1] * WORLD


def test_a_run_resumes_after_a_full_disk(folder: Path, tmp_path: Path) -> None:
    assert trainer_state(folder / MAIN / "diverged")["step"] == 1
    assert trainer_state(folder / MAIN / "full disk")["step"] == 12


def output_lines(job: subprocess.Popen[str]) -> list[str]:
    """Return the lines that the command printed; no process may hang."""
    out, errors = job.communicate(timeout=120)
    assert errors.count("Traceback") <= 1  # torchrun's
    return [line for line in (out + errors).splitlines() if "eigenfilter train" in line]


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


def test_all_fail_and_one_reports_it(tmp_path: Path) -> None:
    job = torchrun(2, "-m", "eigenfilter", "train", "--batch-size=33", "--out", str(tmp_path))
    [line] = output_lines(job)
    assert line.startswith("eigenfilter train: error: batch_size gives 33 images per step")
    assert job.returncode == 1  # torchrun's


def train_until(end: str, folder: Path) -> int:
    """Run `eigenfilter train` in two processes, of which the second ends in its sixth step."""
    advance = Trainer.advance

    def failing(self: Trainer) -> None:
        if self.step == 5 and os.environ["RANK"] == "1":
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory")
        advance(self)

    Trainer.advance = failing  # type: ignore[method-assign]
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    return main(["train", *flags, "--checkpoint-every=4", "--out", str(folder)])


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("killed", "another process of the run ended, or cannot be reached"),
        ("out of memory", "out of memory at step 6; lower batch_size"),
    ],
)
def test_one_fails_and_none_hangs(end: str, says: str, tmp_path: Path) -> None:
    [line] = output_lines(torchrun(2, __file__, str(tmp_path), end))
    assert line.startswith(f"eigenfilter train: error: {says}")
    assert trainer_state(tmp_path)["step"] == 4


SCENARIOS = (
    train_alike,
    train_in_parts,
    refuse,
    train_on_a_full_disk,
    begin_and_resume,
    train_a_step,
)


def run_scenarios(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    with init_distributed() as processes:
        for scenario in SCENARIOS:
            results |= scenario(Job(rank, processes, folder / f"of{rank}"))
    torch.save(results, folder / f"{rank}.pt")
    threads = threads_of_gloo()
    assert not threads, threads  # one that still holds a tensor aborts the process as it ends


def threads_of_gloo() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name.startswith("pt_gloo")]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(train_until(sys.argv[2], Path(sys.argv[1])))
    run_scenarios(Path(sys.argv[1]))
