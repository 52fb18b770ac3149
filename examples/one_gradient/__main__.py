"""Compare what flatness costs: extrapolated momentum beside its controls and beside ascents.

    python examples/one_gradient out/one --data DIR

DIR holds Fashion-MNIST as torchvision unpacks it and CIFAR-10; `--problems gpt` needs neither. For
every method the study tries each learning rate of the problem's grid, keeps the one with the best
accuracy on a validation set, and trains with it from other seeds. It writes one_gradient.png and
one_gradient.md into the folder, and every run into runs.jsonl. A second call goes on where the
first one ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import report
from methods import METHODS
from problems import PROBLEMS, Problem
from training import train

from eigenfilter.experiments.files import replace_text

TUNING_SEED = 100  # the first seed of runs that choose lr; the others are 0, 1, ...

Run = tuple[str, str, float, int, bool]
"""A problem, a method, a learning rate, a seed, and whether it is a final run."""


def runs_to_tune(name: str, problem: Problem) -> list[Run]:
    """The runs that choose the learning rates of a problem."""
    seeds = range(TUNING_SEED, TUNING_SEED + problem.tuning_seeds)
    return [(name, method, lr, s, False) for s in seeds for method in METHODS for lr in problem.lrs]


def final_runs(name: str, problem: Problem, records: Iterable[dict[str, Any]]) -> list[Run]:
    """The runs that are reported, at each method's best learning rate."""
    mine = [r for r in records if r["problem"] == name and r["lr"] in problem.lrs]
    best = best_lrs(mine)
    seeds = range(problem.seeds)
    return [(name, method, best[method], seed, True) for seed in seeds for method in METHODS]


def best_lrs(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each method with the best mean accuracy on the validation set."""
    scores: dict[str, dict[float, list[float]]] = {method: {} for method in METHODS}
    for r in records:
        if not r["final"]:
            score = 0.0 if "diverged" in r else r["validation accuracy"]
            scores[r["method"]].setdefault(r["lr"], []).append(score)
    means = {m: {lr: statistics.fmean(s) for lr, s in by.items()} for m, by in scores.items()}
    return {method: max(by, key=lambda lr: by[lr]) for method, by in means.items()}


def key(record: dict[str, Any]) -> Run:
    """The run that a record is of."""
    return (record["problem"], record["method"], record["lr"], record["seed"], record["final"])


def execute(runs: Sequence[Run], file: Path, args: argparse.Namespace) -> None:
    """Take the runs that the file lacks, and append their records to it."""
    runs = [run for run in runs if run not in {key(r) for r in read(file)}]
    start = time.monotonic()
    context = get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        futures = [
            pool.submit(train, *run[:4], args.data, final=run[4], short=args.short) for run in runs
        ]
        for done, future in enumerate(as_completed(futures), 1):
            record = future.result()
            lines = [json.dumps(r) + "\n" for r in (*read(file), record)]
            replace_text(file, "".join(lines))  # in one piece, whatever ends this process
            left = (time.monotonic() - start) / done * (len(runs) - done)
            print(f"{done}/{len(runs)}, {left / 60:.0f} min left: {_line(record)}", flush=True)


def _line(record: dict[str, Any]) -> str:
    name = f"{record['problem']} {record['method']} lr {record['lr']:g} seed {record['seed']}"
    if "diverged" in record:
        return f"{name}: diverged at step {record['diverged']}"
    if not record["final"]:
        return f"{name}: validation accuracy {100 * record['validation accuracy']:.2f}%"
    accuracy = f"test accuracy {100 * record['test accuracy']:.2f}%"
    return f"{name}: sharpness {record['sharpness']:.2f}, {accuracy}"


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file, if there is one."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Run the study, and write its figure and its tables."""
    parser = argparse.ArgumentParser(
        prog="python examples/one_gradient",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets")
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME",
        help=f"some of {', '.join(PROBLEMS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--short", action="store_true", help="20 steps a run, to try the code")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / ("short.jsonl" if args.short else "runs.jsonl")
    chosen: list[Run] = []
    for name in args.problems:
        problem = PROBLEMS[name].short() if args.short else PROBLEMS[name]
        execute(runs_to_tune(name, problem), file, args)
        chosen += final_runs(name, problem, read(file))
        execute([run for run in chosen if run[0] == name], file, args)
        report.write([r for r in read(file) if key(r) in chosen], args.folder)


if __name__ == "__main__":
    main()
