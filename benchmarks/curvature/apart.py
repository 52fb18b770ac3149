"""One solve in a process of its own: its memory, its time, and an end to it if that grows long.

Memory is the process's high-water mark during the solve less what it held before, with the model,
the data and whatever the libraries keep once they have been used.
"""

from __future__ import annotations

import json
import math
import pickle
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.curvature.problems import Problem, product
from benchmarks.curvature.solver import Found, Solve
from benchmarks.curvature.thread import one_thread, processor
from benchmarks.environment import own_process
from benchmarks.memory import Peak
from benchmarks.timing import Lap


@dataclass(frozen=True)
class Outcome:
    """What a solve found, in what time, and its memory in bytes beyond the model and the data."""

    found: Found
    lap: Lap
    memory: int


class Apart:
    """Solves of one problem, each in a new process.

    Args:
        problem: is written to the folder for them.
        folder: for what goes to and from.
        timed: whether their time counts. If not, freed memory goes back to the system at once,
            which takes time and shows less than a MB of memory; if so, the allocator works as ever.
    """

    def __init__(self, problem: Problem, folder: Path, *, timed: bool) -> None:
        self._problem, self._result = folder / "problem.pt", folder / "result.json"
        torch.save(problem, self._problem)
        prompt = {} if timed else {"MALLOC_MMAP_THRESHOLD_": "65536"}
        self._environment = own_process() | {"OMP_NUM_THREADS": "1"} | prompt

    def __call__(self, solve: Solve, limit: float = math.inf) -> Outcome | None:
        """Solve; None if it would have taken more than about `limit` seconds of the processor.

        Raises:
            subprocess.CalledProcessError: the process failed, for any other reason.
        """
        self._result.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(self._problem), str(self._result)],
            input=pickle.dumps((solve, limit)),
            env=self._environment,
        )
        if done.returncode == -signal.SIGXCPU:
            return None
        done.check_returncode()
        found = json.loads(self._result.read_text())
        values = torch.tensor(found["values"], dtype=torch.float64)
        return Outcome(Found(values, found["products"]), Lap(*found["lap"]), found["memory"])


def _solve(problem: Problem, solve: Solve, limit: float) -> dict[str, object]:
    """Solve in this process, which the system ends at the limit."""
    product(problem, problem.gradients(), False)  # what the libraries keep once they are used
    solve(_small(isinstance(problem.data, tuple)))
    peak = Peak(torch.device("cpu"))
    before = peak.now()
    peak.restart()
    if limit < math.inf:
        end = math.ceil(time.process_time() + limit)
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    found: list[Found] = []
    lap = processor(lambda: found.append(solve(problem)))
    memory = peak.most() - before
    values = found[0].values.double().tolist()
    return {"values": values, "products": found[0].products, "lap": lap, "memory": memory}


def _small(single: bool) -> Problem:
    """A problem of 200 parameters, in one batch or a loader of two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 10))
    inputs, labels = torch.randn(20, 8), torch.arange(20) % 10
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=10)
    return Problem(model, nn.CrossEntropyLoss(), (inputs, labels) if single else loader)


if __name__ == "__main__":  # a process of `Apart`
    with one_thread():
        # The parent wrote both.
        given = torch.load(sys.argv[1], weights_only=False)
        answer = _solve(given, *pickle.load(sys.stdin.buffer))
    Path(sys.argv[2]).write_text(json.dumps(answer))
