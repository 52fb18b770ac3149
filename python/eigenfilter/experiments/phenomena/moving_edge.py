"""A moving edge: rho and lr change during training, and the sharpness follows.

USAM trains in five phases of equal length. When rho or lr increases, the edge falls, and the
sharpness follows at once. When one decreases, the edge rises, and only progressive sharpening can
raise the sharpness: a filter bounds the sharpness from above and does not raise it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass

import eigenfilter as ef
from eigenfilter.experiments.full_batch import FullBatchRun, FullBatchTraining, MethodSpec
from eigenfilter.experiments.phenomena.common import configure as configure_training
from eigenfilter.experiments.phenomena.common import (
    parse_setting,
    report,
    settled_ratio,
    train,
    verdict,
)
from eigenfilter.experiments.reporting import align_columns
from eigenfilter.filters import design

HELP = "the sharpness follows when rho or lr changes"
TITLE = "An edge that moves"


@dataclass(frozen=True)
class TrainingPhase:
    """A phase of the training.

    Attributes:
        change: description of the change of the hyperparameters.
        lr, rho: hyperparameters of USAM in this phase.
    """

    change: str
    lr: float
    rho: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    configure_training(parser, "moving-edge", steps=3000)


def run(args: argparse.Namespace) -> int:
    """Train through the phases; return the exit code."""
    setting = parse_setting(args)
    plan = phases(setting.edge)

    def change(training: FullBatchTraining) -> None:
        now = min(training.step * len(plan) // setting.steps, len(plan) - 1)
        for group in training.optimizer.param_groups:
            group["lr"], group["rho"] = plan[now].lr, plan[now].rho

    first = plan[0]
    method = MethodSpec(
        "USAM",
        "lr and rho change",
        lambda params: ef.USAM(params, lr=first.lr, rho=first.rho),
    )
    result = train(setting, method, after_step=change)
    parts = by_phase(result, plan, setting.steps)
    print("\n" + align_columns([_HEAD, *(_row(part) for part in parts)]))
    report(setting, "moving-edge", TITLE, [result], {"phases": parts})
    return 0


def phases(edge: float) -> list[TrainingPhase]:
    """Return the phases, whose edges are `edge` times 1, 0.8, 1, 1.25 and 0.9."""
    rho = 0.1 / edge
    lr = design("usam", edge, rho=rho)
    more = design("usam", 0.8 * edge, lr=lr)
    small, large = (design("usam", factor * edge, rho=rho) for factor in (1.25, 0.9))
    return [
        TrainingPhase("start", lr, rho),
        TrainingPhase("rho raised", lr, more),
        TrainingPhase("rho lowered", lr, rho),
        TrainingPhase("lr lowered", small, rho),
        TrainingPhase("lr raised", large, rho),
    ]


def by_phase(run: FullBatchRun, plan: list[TrainingPhase], steps: int) -> list[dict[str, object]]:
    """Return the ratios at the start and the end of each phase that training reached."""
    parts: list[dict[str, object]] = []
    for number, phase in enumerate(plan):
        first, end = (math.ceil(part * steps / len(plan)) for part in (number, number + 1))
        last = number == len(plan) - 1
        checks = [c for c in run.history if first <= c.step < end or (last and c.step == end)]
        if checks:
            parts.append(
                asdict(phase)
                | {"edge": checks[0].edge, "began_at": checks[0].ratio}
                | {"settled": asdict(settled_ratio(checks)), "outcome": verdict(checks)}
            )
    return parts


_HEAD = ("settings", "lr", "rho", "edge", "ratio at first", "ratio at last", "outcome")


def _row(part: dict[str, object]) -> tuple[str, ...]:
    ends = part["settled"]
    assert isinstance(ends, dict)
    numbers = (part["lr"], part["rho"], part["edge"], part["began_at"], ends["mean"])
    return (str(part["change"]), *(f"{x:.3g}" for x in numbers), str(part["outcome"]))
