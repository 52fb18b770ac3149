"""Train a small network with four optimizers until each sits at the edge of its filter.

A 64-40-10 tanh network learns 400 of scikit-learn's digits: full batch, float64, square loss.
Each method sharpens until the largest Hessian eigenvalue meets the edge that the theory gives for
its hyperparameters, and stays there. Prints a table; writes sharpness.png and results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import eigenfilter as ef
from eigenfilter.experiments.arguments import output_folder, positive, whole
from eigenfilter.experiments.data import Split, digits
from eigenfilter.experiments.edge import BAND, EVERY, Method, Run, train_to_edge
from eigenfilter.experiments.errors import require
from eigenfilter.experiments.figures import Curve, sharpness_figure

HELP = "watch four optimizers reach the edges of their filters"
SAMPLES = 400
TITLE = "Training ends at the edge of the filter"

METHODS = (
    Method("gradient descent", "lr 0.2", lambda p: ef.SGD(p, lr=0.2)),
    Method("heavy ball", "lr 0.2, momentum 0.5", lambda p: ef.SGD(p, lr=0.2, momentum=0.5)),
    Method(
        "Nesterov",
        "lr 0.1, momentum 0.9",
        lambda p: ef.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    Method("USAM", "lr 0.2, rho 0.05", lambda p: ef.USAM(p, lr=0.2, rho=0.05)),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="folder for sharpness.png and results.json (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="of the initial weights (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=whole(1),
        default=4000,
        metavar="N",
        help=f"most steps a method may take, checked every {EVERY} (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=2.0,
        metavar="MINUTES",
        help="most time the training may take (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, print the table, write the files; return the exit code."""
    require("matplotlib", "sklearn", "tqdm")
    folder = output_folder(args.out)
    data = digits(SAMPLES)
    began = time.perf_counter()
    runs = []
    for done, method in enumerate(METHODS, start=1):
        deadline = began + 60.0 * args.budget * done / len(METHODS)
        runs.append(_train(method, data, args.seed, args.steps, deadline))
    print(f"\n{table(runs)}\n")
    sharpness_figure([_curve(run) for run in runs], folder / "sharpness.png", TITLE)
    results = {
        "command": "demo",
        "seed": args.seed,
        "samples": SAMPLES,
        "band": BAND,
        "versions": {"eigenfilter": ef.__version__, "torch": torch.__version__},
        "runs": [run.as_json() for run in runs],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {folder / 'sharpness.png'} and {folder / 'results.json'}")
    return 0


def _train(method: Method, data: Split, seed: int, max_steps: int, deadline: float) -> Run:
    """One method with a progress bar, or a line at its end where there is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=method.name, unit=" steps", leave=False, disable=None) as bar:

        def show(run: Run) -> None:
            bar.update(run.last.step - bar.n)
            bar.set_postfix_str(f"sharpness {run.last.sharpness:.2f}, edge {run.edge:.2f}")

        run = train_to_edge(
            method, data, seed=seed, max_steps=max_steps, deadline=deadline, on_check=show
        )
    print(f"{run.method}: {run.outcome} ({run.last.step} steps, {run.seconds:.1f} s)", flush=True)
    return run


def _curve(run: Run) -> Curve:
    steps = [check.step for check in run.history]
    sharpness = [check.sharpness for check in run.history]
    return Curve(f"{run.method} ({run.settings})", steps, sharpness, run.edge)


def table(runs: Sequence[Run]) -> str:
    """The results as text, one row a method.

    The residual ||H v - sharpness v|| bounds the distance to an eigenvalue of the Hessian H.
    """
    rows = [_HEAD, *map(_row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, _HEAD, strict=True)
        aligned = (w.ljust(n) if name in _WORDS else w.rjust(n) for w, n, name in cells)
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


_HEAD = (
    "method",
    "settings",
    "loss",
    "train",
    "test",
    "sharpness",
    "residual",
    "edge",
    "ratio",
    "outcome",
)
_WORDS = ("method", "settings", "outcome")


def _row(run: Run) -> tuple[str, ...]:
    return (
        run.method,
        run.settings,
        f"{run.last.loss:.5f}",
        f"{run.train_accuracy:.1%}",
        f"{run.test_accuracy:.1%}",
        f"{run.last.sharpness:.3f}",
        f"{run.last.residual:.0e}",
        f"{run.edge:.3f}",
        f"{run.ratio:.3f}",
        run.outcome,
    )
