"""eigenfilter train: its files, resumption to the same bits, and the ways it can end."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eigenfilter as ef
from eigenfilter.experiments import checkpoint, runs, train
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.trainer import Trainer
from experiments import folders
from experiments.test_checkpoint import file_size_limit

SMALL: dict[str, Any] = {
    "samples": 96,
    "batch_size": 32,
    "model": "mlp-12",
    "epochs": 4,
    "log_every": 5,
    "lr": 0.05,
}


class Killed(Exception):
    """Stands for a process that ends without cleanup."""


def kill_after(steps: int) -> Any:
    """Return a stop condition that raises Killed after a number of steps."""
    left = iter(range(steps - 1))

    def stop() -> bool:
        if next(left, None) is None:
            raise Killed
        return False

    return stop


def stop_after(steps: int) -> Any:
    left = iter(range(steps - 1))
    return lambda: next(left, None) is None


def trainer_state(folder: Path) -> dict[str, Any]:
    """Return the trainer's state in the checkpoint of a folder."""
    return checkpoint.read(folder / checkpoint.FILE)["trainer"]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the log without values that depend on the clock."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


def assert_same(a: Any, b: Any) -> None:
    """Assert that two values are equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


EVERYTHING = SMALL | {
    "crop": 1,
    "flip": True,
    "cutout": 2,
    "dropout": 0.2,
    "warmup": 1,
    "rho_schedule": "every",
    "rho_every": 2,
    "sharpness_every": 3,
    "sharpness_samples": 20,
    "checkpoint_every": 5,
}

CONTROLLED = EVERYTHING | {"rho_schedule": "constant"}

RUNS = {
    "usam": EVERYTHING | {"optimizer": "usam"},
    "two steps, batch norm": EVERYTHING
    | {"optimizer": "two_step_usam", "model": "wrn-10-1", "samples": 32, "batch_size": 16}
    | {"epochs": 6, "sharpness_every": 0},
    "differences": EVERYTHING
    | {"optimizer": "hessian_usam", "activation": "tanh", "rho": 0.001, "lr": 0.01},
    "adamw, sam": EVERYTHING | {"optimizer": "adamw", "method": "sam", "lr": 0.003},
    "torch, bfloat16": EVERYTHING
    | {"optimizer": "torch.optim.RMSprop", "method": "usam", "lr": 0.001}
    | {"precision": "bfloat16", "clip": 0.5},
    "float64": EVERYTHING | {"optimizer": "sgd", "precision": "float64", "loss": "square"},
    "extrapolation": EVERYTHING | {"optimizer": "sgd", "extrapolation": 0.05},
    "adamw, extrapolation": EVERYTHING
    | {"optimizer": "adamw", "extrapolation": 0.005, "lr": 0.003, "beta1": 0.8},
    "codes of 8 bits": EVERYTHING | {"optimizer": "usam", "state_bits": 8},
    "adamw, codes of 8 bits": EVERYTHING
    | {"optimizer": "adamw", "method": "sam", "lr": 0.003, "state_bits": 8},
    "looking back": EVERYTHING | {"optimizer": "sgd", "extrapolation": -0.01},
    "controlled": CONTROLLED | {"optimizer": "sgd", "sharpness_target": 20.0},
    "controlled by rho": CONTROLLED | {"optimizer": "usam", "sharpness_target": 20.0},
    "controlled adamw": CONTROLLED
    | {"optimizer": "adamw", "lr": 0.003, "sharpness_target": 1000.0, "sharpness_every": 0},
}


GRADIENTS = {  # of 12 steps; rho is 0, and there is no ascent, in every second one
    "usam": 18,
    "two steps, batch norm": 24,
    "differences": 24,
    "adamw, sam": 18,
    "torch, bfloat16": 18,
    "float64": 12,
    "extrapolation": 12,
    "adamw, extrapolation": 12,
    "codes of 8 bits": 18,
    "adamw, codes of 8 bits": 18,
    "looking back": 12,
    "controlled": 12,
    "controlled by rho": 24,
    "controlled adamw": 12,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    """The run is stopped in an epoch, then killed after a checkpoint, then completed."""
    config = Config(**RUNS[name])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.run(config, whole)
    torch.randn(7)  # the global generator is no part of a run
    first = runs.run(config, parts, stop=stop_after(4))
    assert (first["outcome"], first["step"]) == ("stopped", 4)
    with pytest.raises(Killed):
        runs.run(config, parts, resume=True, stop=kill_after(3))
    assert trainer_state(parts)["step"] == 5
    last = runs.run(config, parts, resume=True)
    assert (last["outcome"], last["step"]) == ("complete", 12)
    assert_same(trainer_state(whole), trainer_state(parts))
    assert lines(whole) == lines(parts)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, parts)]
    assert results[0]["gradients"] == GRADIENTS[name]
    for record in results:
        assert record["train"].pop("images_per_second") > 0
        assert record.pop("seconds") > 0
    assert results[0] == results[1]


CONTROL = {
    "samples": 200,
    "batch_size": 0,
    "model": "mlp-8",
    "activation": "tanh",
    "loss": "square",
    "epochs": 150,
    "lr": 0.02,
    "optimizer": "sgd",
    "sharpness_every": 10,
    "sharpness_samples": 200,
    "evaluate_every": 150,
    "threads": 1,
}


def test_a_controlled_run_ends_at_its_target(tmp_path: Path) -> None:
    """Without control the sharpness ends at about 24.5, and before that the edge bounds nothing."""
    config = Config(**CONTROL | {"sharpness_target": 16.0})
    results = runs.run(config, tmp_path)
    log = lines(tmp_path)
    checks = [record for record in log if record["kind"] == "sharpness"]
    assert checks[0]["step"] == 1
    assert checks[-1]["sharpness"] == pytest.approx(16.0, rel=0.1)
    assert checks[-1]["extrapolation"] > 0.0
    assert results["sharpness"]["extrapolation"] == checks[-1]["extrapolation"]
    trained = [record["extrapolation"] for record in log if record["kind"] == "train"]
    assert len(set(trained)) > 1
    summary = train.summary(results)
    assert f"extrapolation {checks[-1]['extrapolation']:.4g}" in summary


def test_two_and_two_epochs_are_four(tmp_path: Path) -> None:
    config = Config(**EVERYTHING)
    runs.run(config, tmp_path / "whole")
    runs.run(config, tmp_path / "parts", stop=stop_after(6))
    runs.run(config, tmp_path / "parts", resume=True)
    assert_same(trainer_state(tmp_path / "whole"), trainer_state(tmp_path / "parts"))


def test_seeds_decide(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        runs.run(Config(**EVERYTHING | {"seed": seed}), tmp_path / folder)
    a, b, c = (trainer_state(tmp_path / folder)["model"] for folder in "abc")
    assert_same(a, b)
    assert not torch.equal(a["1.weight"], c["1.weight"])


def test_torch_is_left_as_it_was(tmp_path: Path, threads: None) -> None:
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    events = []
    config = Config(**EVERYTHING | {"threads": 1})
    runs.run(config, tmp_path, observe=lambda *record: events.append(torch.get_num_threads()))
    assert set(events) == {1}
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_the_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--out", str(tmp_path), "--samples", "400", "--epochs", "20", "--tensorboard"]
    argv += ["--sharpness-every", "100", "--optimizer", "usam", "--log-every", "30"]
    assert main(argv) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["outcome"] == "complete"
    assert results["test"]["accuracy"] > 0.9
    assert results["train"]["accuracy"] > 0.9
    assert results["parameters"] == 65 * 256 + 257 * 10
    config = Config(samples=400, epochs=20, sharpness_every=100, log_every=30)
    assert results["config"] == config.as_dict()
    assert [test["step"] for test in results["history"]] == [3 * e for e in range(1, 21)]
    log = lines(tmp_path)
    assert [r["step"] for r in log if r["kind"] == "train"] == [30, 60]
    assert [r["step"] for r in log if r["kind"] == "sharpness"] == [0]
    assert log[0]["edge"] == pytest.approx(
        ef.filters.USAM(0.1, 0.9, rho=0.05).max_eigenvalue(), rel=1e-12
    )
    assert list((tmp_path / "tensorboard").iterdir())
    out = capsys.readouterr().out
    assert out.count("test loss") == 21
    assert f"accuracy {results['test']['accuracy']:.2%}" in out
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path), "--resume"]) == 0
    assert lines(tmp_path) == log  # complete: nothing is done again


# Every way it can end.


def test_ctrl_c_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    out = ["--out", str(tmp_path / "run")]
    advance = Trainer.advance

    def interrupted(self: Trainer) -> None:
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        advance(self)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["train", *flags, *out]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer_state(tmp_path / "run")["step"] == 5
    output = capsys.readouterr().out
    command = f"eigenfilter train --resume --out {tmp_path / 'run'}"
    assert f"stopped at step 5; to continue: {command}" in output
    monkeypatch.setattr(Trainer, "advance", advance)
    assert main(["train", "--resume", *out]) == 0
    runs.run(Config(**SMALL), tmp_path / "whole")
    assert_same(trainer_state(tmp_path / "run"), trainer_state(tmp_path / "whole"))


def test_a_second_ctrl_c_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_budget_stops_with_a_checkpoint(tmp_path: Path) -> None:
    assert main(["train", "--out", str(tmp_path), "--budget", "1e-9"]) == 0
    assert trainer_state(tmp_path)["step"] == 1


def test_the_last_good_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advance = Trainer.advance

    def poisoned(self: Trainer) -> None:
        advance(self)
        if self.step == 6:  # a parameter that no loss has seen yet, when a checkpoint is due
            next(self.model.parameters()).data[0, 0] = float("nan")

    monkeypatch.setattr(Trainer, "advance", poisoned)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    assert main(["train", *flags, "--out", str(tmp_path), "--checkpoint-every", "3"]) == 2
    output = capsys.readouterr().err
    assert "a parameter is not finite after step 6" in output
    assert "the checkpoint of step 3 is kept" in output
    assert output.count("\n") == 1
    assert trainer_state(tmp_path)["step"] == 3
    assert all(p.isfinite().all() for p in trainer_state(tmp_path)["model"].values())


@pytest.mark.parametrize("size", [4_000, 600])
def test_a_full_disk(size: int, tmp_path: Path) -> None:
    """The disk is too full for the checkpoint, or even for the log."""
    config = Config(**SMALL | {"checkpoint_every": 4, "log_every": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(kind: str, step: int, record: dict[str, Any]) -> None:
        if kind == "checkpoint":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))

    try:
        with pytest.raises(UserError) as error:
            runs.run(config, tmp_path, observe=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    file = "checkpoint.pt" if size > 2_000 else "log.jsonl"
    assert f"cannot write {tmp_path / file}: File too large" in str(error.value)
    assert "the checkpoint of step 4 is kept" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "config.yaml",
        "log.jsonl",
    ]
    last = runs.run(config, tmp_path, resume=True)  # room was made
    assert last["outcome"] == "complete"
    runs.run(config, tmp_path / "whole")
    assert_same(trainer_state(tmp_path / "whole"), trainer_state(tmp_path))
    assert lines(tmp_path / "whole") == lines(tmp_path)


def test_no_disk_space_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with file_size_limit(0):
        assert main(["train", "--out", str(tmp_path)]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "cannot write" in output


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_memory_that_does_not_suffice(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def exhausted(self: Trainer) -> None:
        if self.step == 5 and device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.step == 5:
            torch.empty(2**55)
        advance(self)

    monkeypatch.setattr(Trainer, "advance", exhausted)
    with pytest.raises(UserError, match="step 6; lower batch_size; the checkpoint of step 4 is"):
        runs.run(Config(**SMALL | {"checkpoint_every": 4}), tmp_path)


def assert_command_fails(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("eigenfilter train: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("yaml", "flags", "says"),
    [
        ("learning_rate: 1", [], "unknown option 'learning_rate'"),
        ("optimiser: usam", [], "unknown option 'optimiser': did you mean optimizer?"),
        ("lr: quick", [], "lr must be a number of at least 0, not 'quick'"),
        ("- 1", [], "must contain lines such as"),
        ("", ["--nesterov", "--momentum", "0"], "nesterov needs momentum"),
        ("", ["--extrapolation", "0.1"], "extrapolation applies only to sgd and adamw"),
        ("state_bits: 4", [], "state_bits must be one of 0, 8, 16, not '4'"),
        ("state_bits: true", [], "state_bits must be one of 0, 8, 16, not 'True'"),
        ("precision: float64", ["--state-bits", "8"], "usam in float64: leave it out"),
        ("optimizer: torch.optim.SGD", ["--state-bits", "8"], "in float32, and this is torch"),
        ("extrapolation: .nan", [], "extrapolation must be a finite number, not nan"),
        ("extrapolation: -.inf", [], "extrapolation must be a finite number, not -inf"),
        (
            "optimizer: sgd\nmomentum: 0",
            ["--extrapolation", "-0.1"],
            "extrapolation follows the momentum buffer of heavy ball",
        ),
        ("sharpness_target: -1", [], "sharpness_target must be a number of at least 0, not -1"),
        (
            "rho_schedule: lr",
            ["--sharpness-target", "9"],
            "rho_schedule lr sets rho, and so would sharpness_target",
        ),
        (
            "optimizer: torch.optim.SGD",
            ["--sharpness-target", "9"],
            "choose a method such as usam, or an optimizer of eigenfilter",
        ),
        ("optimizer: sam", ["--sharpness-target", "9"], "use USAM, TwoStepUSAM or HessianUSAM"),
        ("optimizer: adamw\nmethod: sam", ["--sharpness-target", "9"], "or leave method out"),
        (
            "optimizer: sgd\nmomentum: 0",
            ["--sharpness-target", "9"],
            "set momentum > 0, and no nesterov",
        ),
        ("", ["--crop", "9"], "crop must be at most the images' side, 8"),
        ("", ["--model", "vit-40"], "multiple of 32, not 40"),
        ("", ["--samples", "9999"], "digits has 1437 training images, not 9999"),
        ("", ["--warmup", "99"], "warmup takes 99 epochs"),
        ("", ["--device", "tpu"], "tpu is not a device"),
        ("", ["--device", "meta"], "meta is not supported"),
        ("", ["--device", "cuda:99"], "CUDA devices, not cuda:99"),
        ("", ["--optimizer", "torch.optim.Nope"], "torch.optim.Nope is not an optimizer"),
        ("", ["--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
    ],
)
def test_bad_input(
    yaml: str, flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml)
    assert_command_fails(
        [str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o"), *flags], says, capsys
    )


def test_a_folder_that_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run(Config(**SMALL), tmp_path, stop=stop_after(2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    out = ["--out", str(tmp_path)]
    assert_command_fails(out, "contains a run; continue it with --resume", capsys)
    assert_command_fails([*out, "--resume", "--lr", "0.3"], "a run with lr 0.05, not 0.3", capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "checkpoint.pt").write_bytes(before[:3000])
    assert_command_fails([*out, "--resume"], "is damaged", capsys)


def test_resuming_where_there_is_nothing_starts(tmp_path: Path) -> None:
    assert runs.run(Config(**SMALL), tmp_path, resume=True)["step"] == 12


def test_other_data_are_noticed(tmp_path: Path) -> None:
    folders.mnist(tmp_path / "a")
    folders.mnist(tmp_path / "b")
    labels = tmp_path / "b" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    raw = labels.read_bytes()
    labels.write_bytes(raw[:-1] + bytes([(raw[-1] + 1) % 10]))
    config = Config(dataset="mnist", model="cnn-2", batch_size=10)
    runs.run(config, tmp_path / "out", data_dir=tmp_path / "a", stop=stop_after(3))
    with pytest.raises(UserError, match="was trained on other data"):
        runs.run(config, tmp_path / "out", data_dir=tmp_path / "b", resume=True)


@pytest.mark.parametrize("module", ["yaml", "tqdm", "sklearn"])
def test_a_missing_extra_is_named(
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert_command_fails(
        ["--out", str(tmp_path)], f"{module} is not installed: pip install", capsys
    )
