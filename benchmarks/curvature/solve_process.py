"""One solve in a process of its own, to measure its memory and time and to stop it if it is slow.

Memory is the process's high-water mark during the solve less what it held before. Before the solve
it holds the model, the data and what the libraries keep after their first use.
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

from benchmarks.curvature.problems import HessianProblem, product
from benchmarks.curvature.single_thread import cpu_clock, single_thread
from benchmarks.curvature.solver import Solution, Solve
from benchmarks.environment import subprocess_environment
from benchmarks.memory import PeakMemory
from benchmarks.timing import Timing


@dataclass(frozen=True)
class ProcessResult:
    """The result of a solve in a process of its own.

    Attributes:
        solution: the eigenvalues.
        timing: the time of the solve.
        memory: bytes beyond the model and the data.
    """

    solution: Solution
    timing: Timing
    memory: int


class SolveProcesses:
    """Solves of one problem, each in a new process.

    Args:
        problem: the problem, which is written to the folder for the processes.
        folder: the folder for the files that go to and from the processes.
        is_timed: whether the time of the solves counts. If not, freed memory goes back to the
            system at once, which takes time but makes differences of less than a MB visible.
    """

    def __init__(self, problem: HessianProblem, folder: Path, *, is_timed: bool) -> None:
        self._problem, self._result = folder / "problem.pt", folder / "result.json"
        torch.save(problem, self._problem)
        allocator = {} if is_timed else {"MALLOC_MMAP_THRESHOLD_": "65536"}
        self._environment = subprocess_environment() | {"OMP_NUM_THREADS": "1"} | allocator

    def __call__(self, solve: Solve, limit: float = math.inf) -> ProcessResult | None:
        """Solve the problem; None if the limit on the time stopped it.

        Args:
            solve: the solve.
            limit: seconds of the processor's time, about.

        Raises:
            subprocess.CalledProcessError: the process failed for another reason.
        """
        self._result.unlink(missing_ok=True)
        process = subprocess.run(
            [sys.executable, "-m", __name__, str(self._problem), str(self._result)],
            input=pickle.dumps((solve, limit)),
            env=self._environment,
        )
        if process.returncode == -signal.SIGXCPU:
            return None
        process.check_returncode()
        result = json.loads(self._result.read_text())
        values = torch.tensor(result["values"], dtype=torch.float64)
        return ProcessResult(
            Solution(values, result["products"]), Timing(*result["timing"]), result["memory"]
        )


def _solve(problem: HessianProblem, solve: Solve, limit: float) -> dict[str, object]:
    """Solve in this process; the system ends the process at the limit."""
    # Two uses of the libraries before the measurement, so that they allocate what they keep.
    product(problem, problem.gradients(), keep_graph=False)
    solve(_small_problem(single_batch=isinstance(problem.data, tuple)))
    peak = PeakMemory(torch.device("cpu"))
    before = peak.now()
    peak.restart()
    if limit < math.inf:
        end = math.ceil(time.process_time() + limit)
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    solutions: list[Solution] = []
    timing = cpu_clock(lambda: solutions.append(solve(problem)))
    memory = peak.most() - before
    [solution] = solutions
    values = solution.values.double().tolist()
    return {"values": values, "products": solution.products, "timing": timing, "memory": memory}


def _small_problem(single_batch: bool) -> HessianProblem:
    """A problem of 200 parameters, with its data in one batch or a loader of two batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 10))
    inputs, labels = torch.randn(20, 8), torch.arange(20) % 10
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=10)
    return HessianProblem(
        model, nn.CrossEntropyLoss(), (inputs, labels) if single_batch else loader
    )


if __name__ == "__main__":  # in a process that `SolveProcesses` starts
    with single_thread():
        # Both pickles are the parent process's own.
        saved_problem = torch.load(sys.argv[1], weights_only=False)
        answer = _solve(saved_problem, *pickle.load(sys.stdin.buffer))
    Path(sys.argv[2]).write_text(json.dumps(answer))
