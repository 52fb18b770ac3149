"""What SharpnessMonitor costs: time of its checks over time of the training between them.

Each network trains by USAM on minibatches, while monitors check the sharpness on a fixed probe,
every so many steps, as precisely as by default and less so. The first check, which has no vector to
start from, counts too. Data are scikit-learn's digits, random tokens for the GPT. Whatever the
interval, a check costs about the same, so many steps; the last column is the interval with which
that is 5% of the training.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import eigenfilter as ef
from benchmarks import environment, finite_differences, report
from benchmarks.curvature.problems import Unfused
from benchmarks.networks import LENGTH, VOCABULARY
from benchmarks.networks import NETWORKS as LARGER
from benchmarks.timing import Spread
from eigenfilter.monitor import SharpnessCheck

TOLERANCES = (5e-4, 1e-2)  # the default, and what tells a sharpness from an edge 5% away
CHECKS = 2  # a run, at least
STEPS = 200  # a run, at least
ROUNDS = 3
GOAL = 0.05  # of the training's time, at one of the intervals


@dataclass(frozen=True)
class Task:
    """A network, the batches it trains on and the probe.

    Attributes:
        build: the network.
        data: inputs and labels, of which the first `probe` are the probe.
        batch: samples a step.
        probe: samples of the probe.
        lr: of USAM.
        every: the intervals.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    probe: int
    lr: float
    every: tuple[int, ...] = (10, 100, 500)


@dataclass(frozen=True)
class Cost:
    """Of one network, interval and tolerance; shares of the training's time, products a check."""

    network: str
    every: int
    tol: float
    share: Spread
    step_ms: float
    check_ms: float
    matvecs: float

    @property
    def enough(self) -> int:
        """The interval with which checks take GOAL of the training's time."""
        return math.ceil(self.check_ms / self.step_ms / GOAL)


def _digits() -> tuple[Tensor, Tensor]:
    inputs, labels = finite_differences.data()
    return inputs.float(), labels


def _tokens() -> tuple[Tensor, Tensor]:
    inputs, labels = torch.randint(VOCABULARY, (2, 64, LENGTH))
    return inputs, labels


TASKS = {
    "tanh MLP": Task(finite_differences.NETWORKS["tanh MLP"], _digits, 64, 256, 0.1),
    "GELU conv": Task(finite_differences.NETWORKS["GELU conv"], _digits, 64, 256, 0.05),
    "GPT": Task(lambda: Unfused(LARGER["gpt"].make()), _tokens, 8, 8, 0.05, (100, 400)),
}


def measure(name: str, every: int, rounds: int) -> list[Cost]:
    """Train and check, `rounds` times anew; one result for each tolerance."""
    runs = [_train(TASKS[name], every, seed) for seed in range(rounds)]
    steps = sum(run.steps for run in runs)
    training = sum(run.seconds for run in runs)
    costs = []
    for i, tol in enumerate(TOLERANCES):
        checks = [check for run in runs for check in run.checks[i]]
        costs.append(
            Cost(
                name,
                every,
                tol,
                Spread.of([sum(c.seconds for c in run.checks[i]) / run.seconds for run in runs]),
                1e3 * training / steps,
                1e3 * sum(check.seconds for check in checks) / len(checks),
                sum(check.matvecs for check in checks) / len(checks),
            )
        )
    return costs


@dataclass(frozen=True)
class Run:
    """Seconds and steps of a training without its checks, and these, for each tolerance."""

    seconds: float
    steps: int
    checks: list[list[SharpnessCheck]]


def _train(task: Task, every: int, seed: int) -> Run:
    steps = max(STEPS, CHECKS * every) // every * every
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.build()
        inputs, labels = task.data()
        order = torch.randint(len(inputs), (steps, task.batch))
    opt = ef.USAM(model.parameters(), lr=task.lr, momentum=0.9, rho=0.02)
    probe = inputs[: task.probe], labels[: task.probe]
    monitors = []
    for tol in TOLERANCES:  # with an operator each: what one keeps would save the other time
        op = ef.curvature.HessianOperator(model, nn.functional.cross_entropy, probe)
        monitors.append(ef.SharpnessMonitor(op, opt, every, tol=tol))
    training = 0.0
    for batch in order:
        x, y = inputs[batch], labels[batch]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            torch.autograd.backward(loss)
            return loss

        began = time.perf_counter()
        opt.step(closure)
        training += time.perf_counter() - began
        for monitor in monitors:
            monitor.step()
    return Run(training, steps, [monitor.history for monitor in monitors])


def select(patterns: list[str]) -> list[str]:
    """Return the networks whose names match any of the patterns, or all for none.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(TASKS, pattern):
            raise ValueError(f"no network {pattern!r}: choose from {', '.join(TASKS)}")
    return [n for n in TASKS if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]


def run(names: list[str], rounds: int, folder: Path) -> None:
    """Measure networks at every interval, print the table, write the results."""
    found = environment.describe(torch.device("cpu"))
    columns = (
        *("network", "every", "tol", "share of training", "step, ms", "check, ms", "products"),
        f"{GOAL:.0%} at every",
    )
    rows = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    print("\n".join(rows))
    costs: list[Cost] = []
    for name in names:
        for every in TASKS[name].every:
            for cost in measure(name, every, rounds):
                costs.append(cost)
                low, median, high = (100 * s for s in asdict(cost.share).values())
                rows.append(
                    f"| {name} | {every} | {cost.tol:g} | {median:.2g}% [{low:.2g}, {high:.2g}] | "
                    f"{cost.step_ms:.3g} | {cost.check_ms:.3g} | {cost.matvecs:.2g} | "
                    f"{cost.enough} |"
                )
                print(rows[-1], flush=True)
    met = [name for name in names if _least(costs, name) <= GOAL]
    title = "# The cost of SharpnessMonitor"
    goal = f"Below {GOAL:.0%} at one of the intervals: {', '.join(met) or 'none'} of {len(names)}."
    print(goal)
    data = {"goal": GOAL, "monitor": [asdict(cost) for cost in costs]}
    report.write(folder, "cpu-monitor", found, [title, "", *rows, "", goal], data)


def _least(costs: list[Cost], name: str) -> float:
    return min(cost.share.median for cost in costs if cost.network == name)
