"""Arguments, training, verdicts and results that the phenomena with a network share."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eigenfilter.experiments.cli_arguments import add_data_dir, add_out, add_training, positive
from eigenfilter.experiments.errors import require
from eigenfilter.experiments.files import output_folder
from eigenfilter.experiments.full_batch import (
    BAND,
    FullBatchRun,
    FullBatchTraining,
    MethodSpec,
    SharpnessMeasurement,
    threads_for,
)
from eigenfilter.experiments.full_batch_problems import (
    ACTIVATIONS,
    DATASETS,
    FullBatchProblem,
    load,
)
from eigenfilter.experiments.losses import LOSSES
from eigenfilter.experiments.plots import curve_from_run, sharpness_figure
from eigenfilter.experiments.reporting import progress, save_results, table

CHECKS = 60  # measurements of the sharpness in a run
_SETTLED = 0.25  # fraction at the end of a run whose mean decides the verdict

# Gradient flow passes these sharpnesses soon after its start, so that training reaches edges there.
EDGES: Mapping[tuple[str, str, str], float] = {
    ("digits", "tanh", "square"): 9.0,
    ("digits", "relu", "square"): 7.0,
    ("digits", "tanh", "cross_entropy"): 0.8,
    ("digits", "relu", "cross_entropy"): 1.0,
    ("fashion", "tanh", "square"): 20.0,
    ("fashion", "relu", "square"): 12.0,
    ("fashion", "tanh", "cross_entropy"): 3.0,
    ("fashion", "relu", "cross_entropy"): 5.0,
}


@dataclass(frozen=True)
class PhenomenonSetting:
    """The problem and the limits of a phenomenon.

    Attributes:
        problem: the network, the data and the loss.
        names: names of the data set, the activation and the loss.
        edge: eigenvalue at which the filters of the methods end.
        seed: seed of the initial weights.
        steps: number of steps of every run.
        deadline: time limit of all runs together, as a value of `time.perf_counter`.
        folder: folder of the results.
    """

    problem: FullBatchProblem
    names: tuple[str, str, str]
    edge: float
    seed: int
    steps: int
    deadline: float
    folder: Path


def configure(parser: argparse.ArgumentParser, name: str, steps: int) -> None:
    """Add the arguments that these phenomena share."""
    text = {"metavar": "NAME", "help": "%(choices)s (default: %(default)s)"}
    parser.add_argument("--dataset", choices=DATASETS, default="digits", **text)  # type: ignore[arg-type]
    parser.add_argument("--activation", choices=ACTIVATIONS, default="tanh", **text)  # type: ignore[arg-type]
    parser.add_argument("--loss", choices=tuple(LOSSES), default="square", **text)  # type: ignore[arg-type]
    add_data_dir(parser, of="Fashion-MNIST")
    add_out(parser, f"out/phenomena/{name}", f"{name}.png and results.json")
    parser.add_argument(
        "--edge",
        type=positive,
        metavar="X",
        help="edge of the filters (default: a sharpness that training on the problem reaches)",
    )
    add_training(parser, steps=steps, of="steps of every run", budget=10.0)


def parse_setting(args: argparse.Namespace) -> PhenomenonSetting:
    """Return the setting that the arguments describe.

    Raises:
        UserError: a package or the data are missing, or the folder cannot be written to.
    """
    require("matplotlib", "sklearn", "tqdm")
    names = (args.dataset, args.activation, args.loss)
    problem = load(*names, args.data_dir)
    folder = output_folder(args.out)
    deadline = time.perf_counter() + 60.0 * args.budget
    edge = args.edge or EDGES[names]
    return PhenomenonSetting(problem, names, edge, args.seed, args.steps, deadline, folder)


def train(
    setting: PhenomenonSetting,
    method: MethodSpec,
    *,
    share: float = 1.0,
    at_start: Callable[[FullBatchTraining], None] | None = None,
    after_step: Callable[[FullBatchTraining], None] | None = None,
) -> FullBatchRun:
    """Train for the setting's steps, measure the sharpness `CHECKS` times, and give a verdict.

    Args:
        setting: the problem and the limits.
        method: the method.
        share: fraction in (0, 1] of the remaining time that this run may take.
        at_start, after_step: called before the first and after every step; they may change the
            optimizer's hyperparameters.
    """
    now = time.perf_counter()
    deadline = now + share * (setting.deadline - now)
    every = max(1, setting.steps // CHECKS)
    with threads_for(setting.problem), progress(f"{method.name} ({method.settings})") as show:
        training = FullBatchTraining(setting.problem, method, setting.seed)
        run = training.run
        if at_start is not None:
            at_start(training)
        while training.check():
            show(run)
            if training.step >= setting.steps:
                run.outcome = verdict(run.history)
            elif time.perf_counter() >= deadline:
                run.outcome = f"time spent: {verdict(run.history)}"
            if run.outcome:
                break
            for _ in range(min(every, setting.steps - training.step)):
                training.advance(1)
                if after_step is not None:
                    after_step(training)
        return training.finish()


@dataclass(frozen=True)
class SettledRatio:
    """Ratio of the sharpness to the edge at the end of a run, or of a phase of it.

    Attributes:
        mean: mean of the ratio over the last quarter of the measurements.
        spread: standard deviation of the ratio over the same measurements.
        peak: largest ratio of all measurements.
    """

    mean: float
    spread: float
    peak: float


def settled_ratio(history: Sequence[SharpnessMeasurement]) -> SettledRatio:
    """Return the ratio over the last quarter of the measurements."""
    ratios = [check.ratio for check in history]
    last = ratios[-max(1, round(_SETTLED * len(ratios))) :]
    return SettledRatio(statistics.fmean(last), statistics.pstdev(last), max(ratios))


def verdict(history: Sequence[SharpnessMeasurement]) -> str:
    """Return where the sharpness settled relative to the edge, within `BAND` of it."""
    settled = settled_ratio(history)
    if settled.mean > 1.0 + BAND:
        return "above its edge"
    if settled.mean >= 1.0 - BAND:
        return "at its edge"
    return "left its edge downwards" if settled.peak >= 1.0 - BAND else "below its edge"


def report(
    setting: PhenomenonSetting,
    name: str,
    title: str,
    runs: Sequence[FullBatchRun],
    more: Mapping[str, object],
) -> None:
    """Print the table, and write the figure and results.json."""
    dataset, activation, loss = setting.names
    print(f"\n{table(runs)}\n")
    figure = setting.folder / f"{name}.png"
    subtitle = f"{dataset}, {activation}, {loss.replace('_', ' ')} loss"
    sharpness_figure([curve_from_run(run) for run in runs], figure, f"{title}: {subtitle}")
    values: dict[str, object] = {
        "dataset": dataset,
        "activation": activation,
        "loss": loss,
        "samples": len(setting.problem.data.inputs),
        "seed": setting.seed,
        "steps": setting.steps,
        "edge": setting.edge,
        "band": BAND,
        **more,
        "runs": [{"settled": asdict(settled_ratio(run.history)), **run.as_json()} for run in runs],
    }
    save_results(setting.folder / "results.json", f"phenomena {name}", values)
    print(f"wrote {figure} and {setting.folder / 'results.json'}")
