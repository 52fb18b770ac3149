"""The processes of `test_processes.py`, which torchrun starts.

processes_workers.py FOLDER runs all scenarios and writes their results to FOLDER/RANK.pt.
processes_workers.py FOLDER END runs `eigenfilter train`, of which one process ends in this way.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from eigenfilter.experiments import datasets, runs
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.processes import Processes, init_distributed
from eigenfilter.experiments.trainer import Trainer

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
RESUMED: dict[str, dict[str, Any]] = {
    "dropout": SMALL | {"dropout": 0.3, "crop": 1, "sharpness_every": 4, "sharpness_samples": 20},
    "batch norm": SMALL
    | {"model": "wrn-10-1", "samples": 48, "epochs": 4, "sharpness_every": 5}
    | {"sharpness_samples": 20, "optimizer": "sgd"},
}
A_STEP = SMALL | {"model": "wrn-10-1", "samples": 24, "epochs": 1}
REFUSED: dict[str, dict[str, Any]] = {
    "batch_size": SMALL | {"batch_size": 32},
    "ascent_part": SMALL | {"ascent_part": 0.2},
    "hvp": SMALL | {"optimizer": "hessian_usam", "hvp": "autograd"},
    "sharpness": SMALL | {"sharpness_every": 1, "sharpness_samples": 2},
    "diverged": SMALL | {"optimizer": "sgd", "lr": 1e18, "log_every": 1, "checkpoint_every": 1},
}


def stop_after(steps: int) -> Callable[[], bool]:
    left = iter(range(steps - 1))
    return lambda: next(left, None) is None


def refusal(call: Callable[[], object]) -> str:
    """Return the message of its UserError."""
    try:
        call()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def scenarios(out: Path, rank: int, processes: Processes) -> dict[str, Any]:
    """Train in one folder per process, of which only that of the main process may be created."""
    results: dict[str, Any] = {}

    def train(name: str, options: dict[str, Any], **others: Any) -> Any:
        return runs.run(Config(**options), out / name, processes=processes, **others)

    events: list[str] = []
    for name, options in ALIKE.items():
        observed = {"observe": lambda kind, step, record: events.append(kind)}
        results[name] = train(name, options, **observed)
    results["seen"] = events
    for name, options in RESUMED.items():
        results[f"{name}, whole"] = train(f"{name}, whole", options)
        stop = stop_after(5) if rank == 1 else lambda: False  # one says so, and all stop
        results[name] = train(f"{name}, parts", options, stop=stop)
        train(f"{name}, parts", options, resume=True)
    for name, options in REFUSED.items():
        results[name] = refusal(lambda n=name, o=options: train(n, o))
    results["full disk"] = refusal(lambda: with_a_full_disk(train))
    train("full disk", SMALL | {"checkpoint_every": 4}, resume=True)
    results["begun alone"] = train("begun alone", ALIKE["usam"], resume=True)
    train("begun by all", ALIKE["usam"], stop=stop_after(5))
    train("a step", A_STEP)
    results["other data"] = refusal(lambda: with_other_data(rank, train))
    results["corrupt"] = refusal(lambda: processes.main_process_first(lambda: corrupt(rank)))
    return results


def with_a_full_disk(train: Callable[..., Any]) -> None:
    """Fill the disk of the main process from the first checkpoint on."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(kind: str, step: int, record: dict[str, Any]) -> None:
        if kind == "checkpoint":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limit[1]))

    try:
        train("full disk", SMALL | {"checkpoint_every": 4}, observe=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def with_other_data(rank: int, train: Callable[..., Any]) -> None:
    """Give each process a different label."""
    data = datasets.load("digits")
    data.labels[0] = rank
    with mock.patch.object(datasets, "load", return_value=data):
        train("other data", SMALL)


def corrupt(rank: int) -> None:
    if rank == 1:
        raise UserError("these data are corrupt")


def ending(end: str, folder: Path) -> int:
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


def threads_of_gloo() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name.startswith("pt_gloo")]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        sys.exit(ending(sys.argv[2], folder))
    rank = int(os.environ["RANK"])
    with init_distributed() as processes:
        torch.save(scenarios(folder / f"of{rank}", rank, processes), folder / f"{rank}.pt")
    left = threads_of_gloo()
    assert not left, left  # one that still holds a tensor aborts the process as it ends
