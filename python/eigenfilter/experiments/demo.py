"""Train a small network with four optimizers until each is at the edge of its filter.

A 64-40-10 tanh network learns 400 of scikit-learn's digits in full batches, in float64, with the
square loss. With each method the largest Hessian eigenvalue rises until it meets the edge that
theory gives for the hyperparameters, and stays there. The command prints a table and writes
sharpness.png and results.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import eigenfilter as ef
from eigenfilter.experiments import full_batch_problems
from eigenfilter.experiments.cli_arguments import add_out, add_training
from eigenfilter.experiments.edge import EVERY, train_to_edge
from eigenfilter.experiments.errors import require
from eigenfilter.experiments.full_batch import BAND, MethodSpec
from eigenfilter.experiments.full_batch_data import digits
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.plots import curve_from_run, sharpness_figure
from eigenfilter.experiments.reporting import progress, save_results, table

HELP = "watch four optimizers reach the edges of their filters"
SAMPLES = 400
TITLE = "Training ends at the edge of the filter"

METHODS = (
    MethodSpec("gradient descent", "lr 0.2", lambda p: ef.SGD(p, lr=0.2)),
    MethodSpec("heavy ball", "lr 0.2, momentum 0.5", lambda p: ef.SGD(p, lr=0.2, momentum=0.5)),
    MethodSpec(
        "Nesterov",
        "lr 0.1, momentum 0.9",
        lambda p: ef.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    MethodSpec("USAM", "lr 0.2, rho 0.05", lambda p: ef.USAM(p, lr=0.2, rho=0.05)),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_out(parser, "out/demo", "sharpness.png and results.json")
    of = f"largest number of steps per method; the sharpness is measured every {EVERY}"
    add_training(parser, steps=4000, of=of, budget=2.0)


def run(args: argparse.Namespace) -> int:
    """Train, print the table and write the files; return the exit code."""
    require("matplotlib", "sklearn", "tqdm")
    with folder_lock(args.out, "demo") as folder:
        return _run(args, folder)


def _run(args: argparse.Namespace, folder: Path) -> int:
    problem = full_batch_problems.FullBatchProblem(digits(SAMPLES))
    began = time.perf_counter()
    runs = []
    for count, method in enumerate(METHODS, start=1):
        deadline = began + 60.0 * args.budget * count / len(METHODS)
        limits = {"max_steps": args.steps, "deadline": deadline}
        with progress(method.name) as show:
            run = train_to_edge(problem, method, seed=args.seed, on_check=show, **limits)
        runs.append(run)
    print(f"\n{table(runs)}\n")
    sharpness_figure([curve_from_run(run) for run in runs], folder / "sharpness.png", TITLE)
    values = {"seed": args.seed, "samples": SAMPLES, "band": BAND}
    values |= {"runs": [run.as_json() for run in runs]}
    save_results(folder / "results.json", "demo", values)
    print(f"wrote {folder / 'sharpness.png'} and {folder / 'results.json'}")
    return 0
