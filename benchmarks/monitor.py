"""What SharpnessMonitor costs: time of its checks over time of the training between them.

Each network trains by USAM on minibatches, while a monitor checks the sharpness on a fixed probe,
every so many steps, as precisely as it does by default. The first check, which has no vector to
start from, counts too. Data are scikit-learn's digits, random tokens for the GPT.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter.benchmarks import environment, finite_differences, report
from eigenfilter.benchmarks.curvature.problems import Unfused
from eigenfilter.benchmarks.networks import LENGTH, VOCABULARY
from eigenfilter.benchmarks.networks import NETWORKS as LARGER
from eigenfilter.benchmarks.timing import Spread

EVERY = (10, 100, 500)
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
    """

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    probe: int
    lr: float


@dataclass(frozen=True)
class Cost:
    """Of one network at one interval; shares of the training's time, products a check."""

    network: str
    every: int
    share: Spread
    step_ms: float
    check_ms: float
    matvecs: float


def _digits() -> tuple[Tensor, Tensor]:
    inputs, labels = finite_differences.data()
    return inputs.float(), labels


def _tokens() -> tuple[Tensor, Tensor]:
    inputs, labels = torch.randint(VOCABULARY, (2, 64, LENGTH))
    return inputs, labels


TASKS = {
    "tanh MLP": Task(finite_differences.NETWORKS["tanh MLP"], _digits, 64, 256, 0.1),
    "GELU conv": Task(finite_differences.NETWORKS["GELU conv"], _digits, 64, 256, 0.05),
    "GPT": Task(lambda: Unfused(LARGER["gpt"].make()), _tokens, 8, 8, 0.05),
}


def measure(name: str, every: int, rounds: int) -> Cost:
    """Train and check, `rounds` times anew."""
    runs = [_train(TASKS[name], every, seed) for seed in range(rounds)]
    return Cost(
        name,
        every,
        Spread.of([checks / training for training, checks, _, _ in runs]),
        1e3 * sum(run[0] for run in runs) / sum(run[3] for run in runs),
        1e3 * sum(run[1] for run in runs) / sum(run[3] / every for run in runs),
        sum(run[2] for run in runs) / sum(run[3] / every for run in runs),
    )


def _train(task: Task, every: int, seed: int) -> tuple[float, float, int, int]:
    """Seconds of training and of checks, products, steps."""
    steps = max(STEPS, CHECKS * every) // every * every
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.build()
        inputs, labels = task.data()
        order = torch.randint(len(inputs), (steps, task.batch))
    opt = ef.USAM(model.parameters(), lr=task.lr, momentum=0.9, rho=0.02)
    probe = inputs[: task.probe], labels[: task.probe]
    op = ef.curvature.HessianOperator(model, nn.functional.cross_entropy, probe)
    monitor = ef.SharpnessMonitor(op, opt, every)
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
        monitor.step()
    checks = sum(check.seconds for check in monitor.history)
    return training, checks, sum(check.matvecs for check in monitor.history), steps


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
    columns = ("network", "every", "share of training", "step, ms", "check, ms", "products a check")
    rows = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    print("\n".join(rows))
    costs = []
    for name in names:
        for every in EVERY:
            costs.append(cost := measure(name, every, rounds))
            low, median, high = (100 * s for s in asdict(cost.share).values())
            rows.append(
                f"| {name} | {every} | {median:.2g}% [{low:.2g}, {high:.2g}] | "
                f"{cost.step_ms:.3g} | {cost.check_ms:.3g} | {cost.matvecs:.2g} |"
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
