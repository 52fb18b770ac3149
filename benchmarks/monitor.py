"""What SharpnessMonitor costs: the time of its checks over that of the training between them.

Each network trains with USAM on minibatches. Monitors check the sharpness on a fixed probe at a
fixed interval of steps, one at the default tolerance and one at a looser tolerance. The first check
counts too, although it has no vector to start from. The data are scikit-learn's digits; the GPT's
are random tokens. A check costs about the same number of steps whatever the interval. The last
column is the interval at which the checks take 5% of the training's time.
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
from benchmarks.curvature.problems import UnfusedAttention
from benchmarks.networks import LENGTH, VOCABULARY
from benchmarks.networks import NETWORKS as LARGER
from benchmarks.timing import Spread
from eigenfilter.monitor import SharpnessCheck

TOLERANCES = (5e-4, 1e-2)  # the default, and enough to tell a sharpness from an edge 5% away
CHECKS = 2  # in a run, at least
STEPS = 200  # in a run, at least
ROUNDS = 3
GOAL = 0.05  # share of the training's time, at one of the intervals


@dataclass(frozen=True)
class MonitoredTraining:
    """A network, the batches it trains on and the probe.

    Attributes:
        build: makes the network.
        data: returns inputs and labels; the first `probe` samples are the probe.
        batch: samples of a step.
        probe: samples of the probe.
        lr: the learning rate of USAM.
        every: the intervals between checks, in steps.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    probe: int
    lr: float
    every: tuple[int, ...] = (10, 100, 500)


@dataclass(frozen=True)
class MonitorCost:
    """The cost for one network, interval and tolerance.

    Attributes:
        network: name of the network.
        every: steps between checks.
        tol: tolerance of the checks.
        share: time of the checks over time of the training, run by run.
        step_ms: milliseconds of a training step.
        check_ms: milliseconds of a check.
        matvecs: Hessian-vector products of a check.
    """

    network: str
    every: int
    tol: float
    share: Spread
    step_ms: float
    check_ms: float
    matvecs: float

    @property
    def interval_for_goal(self) -> int:
        """The interval at which the checks take the share GOAL of the training's time."""
        return math.ceil(self.check_ms / self.step_ms / GOAL)


def _digits() -> tuple[Tensor, Tensor]:
    inputs, labels = finite_differences.data()
    return inputs.float(), labels


def _tokens() -> tuple[Tensor, Tensor]:
    inputs, labels = torch.randint(VOCABULARY, (2, 64, LENGTH))
    return inputs, labels


TRAININGS = {
    "tanh MLP": MonitoredTraining(finite_differences.NETWORKS["tanh MLP"], _digits, 64, 256, 0.1),
    "GELU conv": MonitoredTraining(
        finite_differences.NETWORKS["GELU conv"], _digits, 64, 256, 0.05
    ),
    "GPT": MonitoredTraining(
        lambda: UnfusedAttention(LARGER["gpt"].make()), _tokens, 8, 8, 0.05, (100, 400)
    ),
}


def measure(name: str, every: int, rounds: int) -> list[MonitorCost]:
    """Train and check in `rounds` separate runs; return one result for each tolerance."""
    runs = [_train(TRAININGS[name], every, seed) for seed in range(rounds)]
    steps = sum(run.steps for run in runs)
    training = sum(run.seconds for run in runs)
    costs = []
    for i, tol in enumerate(TOLERANCES):
        checks = [check for run in runs for check in run.checks[i]]
        costs.append(
            MonitorCost(
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
class MonitorRun:
    """A training run.

    Attributes:
        seconds: the time of the training, without the checks.
        steps: how many steps it took.
        checks: for each tolerance, the checks.
    """

    seconds: float
    steps: int
    checks: list[list[SharpnessCheck]]


def _train(config: MonitoredTraining, every: int, seed: int) -> MonitorRun:
    steps = max(STEPS, CHECKS * every) // every * every
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = config.build()
        inputs, labels = config.data()
        order = torch.randint(len(inputs), (steps, config.batch))
    opt = ef.USAM(model.parameters(), lr=config.lr, momentum=0.9, rho=0.02)
    probe = inputs[: config.probe], labels[: config.probe]
    monitors = []
    for tol in TOLERANCES:  # with an operator each: one's cached graphs would save the other time
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

        start = time.perf_counter()
        opt.step(closure)
        training += time.perf_counter() - start
        for monitor in monitors:
            monitor.step()
    return MonitorRun(training, steps, [monitor.history for monitor in monitors])


def select(patterns: list[str]) -> list[str]:
    """Return the networks whose names match any of the patterns, or all for none.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(TRAININGS, pattern):
            raise ValueError(f"no network {pattern!r}: choose from {', '.join(TRAININGS)}")
    return [n for n in TRAININGS if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]


def run(names: list[str], rounds: int, folder: Path) -> None:
    """Measure networks at every interval, print the table, write the results."""
    where = environment.describe(torch.device("cpu"))
    columns = (
        *("network", "every", "tol", "share of training", "step, ms", "check, ms", "products"),
        f"{GOAL:.0%} at every",
    )
    rows = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    print("\n".join(rows))
    costs: list[MonitorCost] = []
    for name in names:
        for every in TRAININGS[name].every:
            for cost in measure(name, every, rounds):
                costs.append(cost)
                low, median, high = (100 * s for s in asdict(cost.share).values())
                rows.append(
                    f"| {name} | {every} | {cost.tol:g} | {median:.2g}% [{low:.2g}, {high:.2g}] | "
                    f"{cost.step_ms:.3g} | {cost.check_ms:.3g} | {cost.matvecs:.2g} | "
                    f"{cost.interval_for_goal} |"
                )
                print(rows[-1], flush=True)
    good = [name for name in names if _smallest_share(costs, name) <= GOAL]
    title = "# The cost of SharpnessMonitor"
    goal = f"At most {GOAL:.0%} at one interval: {', '.join(good) or 'none'} of {len(names)}."
    print(goal)
    data = {"goal": GOAL, "monitor": [asdict(cost) for cost in costs]}
    report.write(folder, "cpu-monitor", where, [title, "", *rows, "", goal], data)


def _smallest_share(costs: list[MonitorCost], name: str) -> float:
    return min(cost.share.median for cost in costs if cost.network == name)
