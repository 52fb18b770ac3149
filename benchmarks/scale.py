"""The memory and time of `eigsh` by dimension, beside what `eigsh_cost` predicts.

The operator is a diagonal matrix in float32 with two eigenvalues beyond the rest. Its products take
almost no time, so nearly all of it is the solver's. Every dimension runs in a process of its own,
on one thread. Memory is the process's high-water mark less what it held before; below a few MB the
solver reuses memory that is already there. Seconds are the processor's, without the products. The
bandwidth is the predicted traffic over these seconds, and it is compared with a copy's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, report
from benchmarks.environment import subprocess_environment
from benchmarks.memory import PeakMemory
from eigenfilter.curvature import eigsh, eigsh_cost

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
K = 2
BASIS = 10
VALUES = (3.0, 2.0)  # the other eigenvalues lie in [0, 1]
COLUMNS = (
    "n",
    "products",
    "MB predicted",
    "MB",
    "flops predicted",
    "GB predicted",
    "seconds",
    "GB/s",
    "of a copy",
)


class Diagonal:
    """A diagonal matrix that records the time of its products in `seconds`."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, n: int) -> None:
        self.shape = n, n
        self.seconds = 0.0
        self._d = torch.linspace(0, 1, n)
        self._d[: len(VALUES)] = torch.tensor(VALUES)

    def matvec(self, v: Tensor) -> Tensor:
        start = time.process_time()
        product = self._d * v
        self.seconds += time.process_time() - start
        return product

    def matmat(self, V: Tensor) -> Tensor:
        return self._d[:, None] * V


def measure(n: int) -> dict[str, Any]:
    """Solve in this process; return the table's figures for dimension `n`."""
    torch.set_num_threads(1)
    peak = PeakMemory(torch.device("cpu"))
    eigsh(Diagonal(1000), K, max_basis=BASIS)  # now the libraries have allocated what they keep
    before = peak.now()
    op = Diagonal(n)
    operator_memory = peak.now() - before
    peak.restart()
    start = time.process_time()
    result = eigsh(op, K, max_basis=BASIS)
    seconds = time.process_time() - start - op.seconds
    memory = peak.most() - before - operator_memory
    if not torch.allclose(result.values, torch.tensor(VALUES), rtol=1e-4):
        raise RuntimeError(
            f"eigsh returned {result.values.tolist()} for the eigenvalues {list(VALUES)}: do not "
            "use these measurements, and run the tests of eigsh"
        )
    cost = eigsh_cost(
        n,
        K,
        products=result.matvecs,
        multiplicity_products=result.multiplicity_matvecs,
        max_basis=BASIS,
    )
    return {
        "n": n,
        "products": result.matvecs,
        "predicted_memory": cost.memory,
        "memory": memory,
        "flops": cost.flops,
        "traffic": cost.traffic,
        "seconds": seconds,
        "copy": _copy_bandwidth(n),
    }


def measure_in_new_process(n: int) -> dict[str, Any]:
    """Run `measure` in a new process, whose freed memory goes back to the system at once."""
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", str(n)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=subprocess_environment() | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    row: dict[str, Any] = json.loads(process.stdout)
    return row


def run(largest: int, folder: Path) -> None:
    """Measure every dimension up to the largest, print the table, write the results."""
    where = environment.describe(torch.device("cpu")) | {"threads": 1}
    rows = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    print("\n".join(rows))
    results = []
    for n in (n for n in SIZES if n <= largest):
        results.append(measure_in_new_process(n))
        rows.append(line(results[-1]))
        print(rows[-1], flush=True)
    title = f"# eigsh by dimension: k = {K}, a basis of {BASIS}, one thread"
    data = {"k": K, "basis": BASIS, "scale": results}
    report.write(folder, "cpu-scale", where, [title, "", *rows], data)


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    rate = row["traffic"] / row["seconds"]
    cells = [
        f"{row['n']:.0e}",
        row["products"],
        f"{row['predicted_memory'] / 1e6:.4g}",
        f"{row['memory'] / 1e6:.4g}",
        f"{row['flops']:.2g}",
        f"{row['traffic'] / 1e9:.3g}",
        f"{row['seconds']:.3g}",
        f"{rate / 1e9:.2g}",
        f"{rate / row['copy']:.0%}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _copy_bandwidth(n: int) -> float:
    """Bytes a second that torch's copy reads and writes, the best of three."""
    source = torch.ones(n)
    target = torch.empty_like(source)
    times = []
    for _ in range(3):
        start = time.process_time()
        target.copy_(source)
        times.append(time.process_time() - start)
    return 2 * source.nbytes / min(times)


if __name__ == "__main__":  # in the process that `measure_in_new_process` starts
    print(json.dumps(measure(int(sys.argv[1]))))
