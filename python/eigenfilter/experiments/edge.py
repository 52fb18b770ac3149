"""Training of a network until its sharpness is at the edge of the optimizer's filter."""

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
from eigenfilter.experiments.full_batch_problems import FullBatchProblem

EVERY = 25  # steps between measurements of the sharpness
HOLD = 40  # consecutive measurements within BAND of the edge that end a run


def at_edge(history: Sequence[SharpnessMeasurement]) -> bool:
    """Return whether the sharpness has reached the edge and stayed within BAND for HOLD checks.

    Both conditions are needed, because a slow climb through the band has not settled at the edge.
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
    """Train in full batches until the sharpness is at the edge, or until a limit.

    Args:
        problem: the network, the data and the loss.
        method: the method.
        seed: seed of the initial weights.
        max_steps: largest number of steps, rounded up to a multiple of EVERY.
        deadline: time limit as a value of `time.perf_counter`; one measurement is always made.
        on_check: called after each measurement.

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
