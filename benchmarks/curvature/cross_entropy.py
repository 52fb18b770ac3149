"""Products with the Hessian of cross-entropy of a large vocabulary, fused and by torch's function.

    python -m benchmarks.curvature.cross_entropy [--tokens 256] [--classes 50257] [--width 64]
        [--out FOLDER]

"loss" is the cross-entropy of logits that are variables: the part of a product that is fused.
"Hessian" and "Gauss-Newton" are products of the engine that keeps graphs, through a last layer
before it; with "projection", that layer's logits are not formed. Both contenders are verified
against each other, and take turns; times are medians. Peaks are the most resident memory of a
process of its own that builds the graph and multiplies, less what it held before, in arrays of the
size of the logits. With --out, the table is written to files there, too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, report
from benchmarks.environment import subprocess_environment
from benchmarks.memory import PeakMemory
from eigenfilter.curvature import GGNOperator, HessianOperator, LinearLogits
from eigenfilter.curvature.engines.derivative_graphs import graph_of
from eigenfilter.curvature.loss import cross_entropy

REPETITIONS = 15
OPERATORS = {"Hessian": HessianOperator, "Gauss-Newton": GGNOperator}
WORK = ("loss", *OPERATORS, *(f"{name}, projection" for name in OPERATORS))
NEVER = 1 << 60  # so many elements that nothing is fused

Product = Callable[[], Tensor]


class _Logits(nn.Module):
    """Logits that are parameters."""

    def __init__(self, tokens: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(3 * torch.randn(tokens, classes))

    def forward(self, _: Any) -> Tensor:
        return self.logits


def unformed(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[LinearLogits, Tensor]:
    """Return the logits of a last layer without forming them, and the targets."""
    return LinearLogits(batch[0], model.weight), batch[1]


def product(work: str, fused: bool, tokens: int, classes: int, width: int) -> Product:
    """Build the graph, and return a function that multiplies by it."""
    torch.manual_seed(0)
    kind, _, projection = work.partition(", ")
    model: nn.Module = _Logits(tokens, classes)
    if kind in OPERATORS:
        model = nn.Linear(width, classes, bias=False)
    loss_fn: Any = nn.CrossEntropyLoss()
    forward = None
    if projection and fused:
        loss_fn, forward = LinearLogits.cross_entropy, unformed
    batch = torch.randn(tokens, width), torch.randint(classes, (tokens,))
    before = cross_entropy.LEAST
    try:
        cross_entropy.LEAST = before if fused else NEVER
        operator = OPERATORS.get(kind, HessianOperator)(model, loss_fn, batch, forward=forward)
        evaluation = operator._objective.evaluate(0, batch)
        graph = graph_of(evaluation, operator.params)
    finally:
        cross_entropy.LEAST = before
    v = torch.randn_like(operator.params[0]).detach()

    def multiply() -> Tensor:
        (result,) = graph.product([v])
        assert result is not None
        return result

    return multiply


def times(work: str, *sizes: int) -> dict[bool, float]:
    """Return the median seconds of a product, fused (True) and not."""
    contenders = {fused: product(work, fused, *sizes) for fused in (True, False)}
    ours, theirs = (multiply() for multiply in contenders.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _, fused in itertools.product(range(REPETITIONS), contenders):
        start = time.perf_counter()
        contenders[fused]()
        seconds[fused].append(time.perf_counter() - start)
    return {fused: statistics.median(of) for fused, of in seconds.items()}


def peak(work: str, fused: bool, tokens: int, classes: int, width: int) -> float:
    """Return the peak of a graph and a product in this process, in arrays of logits."""
    product(work, fused, 64, 2048, width)()  # now the libraries have allocated what they keep
    memory = PeakMemory(torch.device("cpu"))
    before = memory.now()
    memory.restart()
    product(work, fused, tokens, classes, width)()
    return (memory.most() - before) / (4 * tokens * classes)


def peak_in_new_process(work: str, fused: bool, *sizes: int) -> float:
    """Run `peak` in a new process, whose freed memory goes back to the system at once."""
    arguments = [work, str(int(fused)), *map(str, sizes)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.curvature.cross_entropy", "--peak", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=subprocess_environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return float(process.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Hessian products of cross-entropy")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--classes", type=int, default=50257)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        work, fused, *sizes = options.peak
        print(peak(work, fused == "1", *map(int, sizes)))
        return
    own = options.tokens, options.classes, options.width
    threads = torch.get_num_threads()
    rows = [
        "| product | ours, ms | torch, ms | ratio | ours, arrays | torch, arrays | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print(*rows, sep="\n")
    data = []
    for work in WORK:
        of = times(work, *own)
        most = {fused: peak_in_new_process(work, fused, *own) for fused in (True, False)}
        rows.append(
            f"| {work} | {1e3 * of[True]:.1f} | {1e3 * of[False]:.1f} "
            f"| {of[False] / of[True]:.2f} | {most[True]:.2f} | {most[False]:.2f} "
            f"| {most[True] / most[False]:.2f} |"
        )
        print(rows[-1], flush=True)
        data.append(
            {
                "work": work,
                "seconds": {"ours": of[True], "torch": of[False]},
                "arrays": {"ours": most[True], "torch": most[False]},
            }
        )
    if options.out is not None:
        where = environment.describe(torch.device("cpu")) | {"threads": threads}
        title = (
            f"# Hessian products of cross-entropy: {own[0]} tokens, {own[1]} classes, "
            f"width {own[2]}"
        )
        sizes = dict(zip(("tokens", "classes", "width"), own, strict=True))
        contents = {**sizes, "cross_entropy": data}
        report.write(options.out, "cpu-cross-entropy", where, [title, "", *rows], contents)


if __name__ == "__main__":
    main()
