"""What `eigsh` takes by the dimension, beside what `eigsh_cost` foretells.

The operator is a diagonal matrix in float32 with two eigenvalues beyond the rest: products take
next to nothing, and the solver is all there is. Every dimension runs in a process of its own, on
one thread. Memory is the process's high-water mark less what it held before (below some MB it uses
again what was freed). Seconds are the processor's, without the products; the bandwidth that they
stand for is put beside that of a copy.
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
from benchmarks.environment import own_process
from benchmarks.memory import Peak
from eigenfilter.curvature import eigsh, eigsh_cost

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
K = 2
BASIS = 10
VALUES = (3.0, 2.0)  # the rest lies in [0, 1]
COLUMNS = (
    "n",
    "products",
    "MB foretold",
    "MB",
    "flops foretold",
    "GB foretold",
    "seconds",
    "GB/s",
    "of a copy",
)


class Diagonal:
    """A diagonal matrix that knows how long its products take."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, n: int) -> None:
        self.shape = n, n
        self.seconds = 0.0
        self._d = torch.linspace(0, 1, n)
        self._d[: len(VALUES)] = torch.tensor(VALUES)

    def matvec(self, v: Tensor) -> Tensor:
        start = time.process_time()
        found = self._d * v
        self.seconds += time.process_time() - start
        return found

    def matmat(self, V: Tensor) -> Tensor:
        return self._d[:, None] * V


def measure(n: int) -> dict[str, Any]:
    """Solve, in this process."""
    torch.set_num_threads(1)
    peak = Peak(torch.device("cpu"))
    eigsh(Diagonal(1000), K, max_basis=BASIS)  # what the libraries allocate once
    before = peak.now()
    op = Diagonal(n)
    given = peak.now() - before
    peak.restart()
    start = time.process_time()
    found = eigsh(op, K, max_basis=BASIS)
    seconds = time.process_time() - start - op.seconds
    memory = peak.most() - before - given
    if not torch.allclose(found.values, torch.tensor(VALUES), rtol=1e-4):
        raise RuntimeError(f"wrong values {found.values.tolist()} for {VALUES}")
    cost = eigsh_cost(
        n,
        K,
        products=found.matvecs,
        multiplicity_products=found.multiplicity_matvecs,
        max_basis=BASIS,
    )
    return {
        "n": n,
        "products": found.matvecs,
        "foretold": cost.memory,
        "memory": memory,
        "flops": cost.flops,
        "traffic": cost.traffic,
        "seconds": seconds,
        "copy": _copy_bandwidth(n),
    }


def measure_apart(n: int) -> dict[str, Any]:
    """`measure` in a process of its own, whose freed memory goes back to the system at once."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", str(n)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=own_process() | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(largest: int, folder: Path) -> None:
    """Measure every dimension up to the largest, print the table, write the results."""
    where = environment.describe(torch.device("cpu")) | {"threads": 1}
    rows = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    print("\n".join(rows))
    measured = []
    for n in (n for n in SIZES if n <= largest):
        measured.append(measure_apart(n))
        rows.append(line(measured[-1]))
        print(rows[-1], flush=True)
    title = f"# eigsh by the dimension: k = {K}, a basis of {BASIS}, one thread"
    data = {"k": K, "basis": BASIS, "scale": measured}
    report.write(folder, "cpu-scale", where, [title, "", *rows], data)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    rate = row["traffic"] / row["seconds"]
    cells = [
        f"{row['n']:.0e}",
        row["products"],
        f"{row['foretold'] / 1e6:.4g}",
        f"{row['memory'] / 1e6:.4g}",
        f"{row['flops']:.2g}",
        f"{row['traffic'] / 1e9:.3g}",
        f"{row['seconds']:.3g}",
        f"{rate / 1e9:.2g}",
        f"{rate / row['copy']:.0%}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _copy_bandwidth(n: int) -> float:
    """Bytes a second that torch's copy reads and writes, best of three."""
    source = torch.ones(n)
    target = torch.empty_like(source)
    times = []
    for _ in range(3):
        start = time.process_time()
        target.copy_(source)
        times.append(time.process_time() - start)
    return 2 * source.nbytes / min(times)


if __name__ == "__main__":  # the process of `measure_apart`
    print(json.dumps(measure(int(sys.argv[1]))))
