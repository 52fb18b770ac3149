"""Train a network until its sharpness sits at the edge of the optimizer's filter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from eigenfilter.experiments.full_batch import (
    BAND,
    FullBatchRun,
    FullBatchTraining,
    MethodSpec,
    SharpnessMeasurement,
    threads_for,
)
from eigenfilter.experiments.problems import FullBatchProblem

EVERY = 25  # steps between two checks of the sharpness
HOLD = 40  # checks in a row within BAND of the edge that end a run


def at_edge(history: Sequence[SharpnessMeasurement]) -> bool:
    """Whether the sharpness has reached the edge and kept within BAND of it for HOLD checks.

    Both are asked for: a slow climb through the band is not an edge.
    """
    ratios = [check.ratio for check in history]
    recent = ratios[-HOLD:]
    settled_ratio = len(recent) == HOLD and all(abs(ratio - 1.0) <= BAND for ratio in recent)
    return settled_ratio and max(ratios) >= 1.0


def train_to_edge(
    problem: FullBatchProblem,
    method: MethodSpec,
    *,
    seed: int,
    max_steps: int,
    deadline: float,
    on_check: Callable[[FullBatchRun], None],
) -> FullBatchRun:
    """Train, full batch, until the sharpness is at the edge or a limit ends it.

    Args:
        problem: what to learn and to test on.
        method: the optimizer.
        seed: of the initial weights.
        max_steps: limit of the steps, rounded up to a multiple of EVERY.
        deadline: limit of the time, by `time.perf_counter`; the first check is always made.
        on_check: called after each check.

    Returns:
        The run, whose `outcome` says how it ended.
    """
    with threads_for(problem):
        training = FullBatchTraining(problem, method, seed)
        run = training.run
        while training.check():
            on_check(run)
            if at_edge(run.history):
                run.outcome = "at its edge"
            elif time.perf_counter() >= deadline:
                run.outcome = "not at its edge: time spent"
            elif training.step >= max_steps:
                run.outcome = "not at its edge: steps spent"
            if run.outcome:
                break
            training.advance(EVERY)
        return training.finish()
