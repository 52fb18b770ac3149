"""Reproduce an experiment of the paper: MNIST, Fashion-MNIST or CIFAR-10.

Trains with every method, radius, momentum and seed, measures the Hessian of each network at the
end, and writes results.json, summary.md, spectra.png and report.html. The same command goes on with
what was interrupted. With --budget the experiment is scaled down to what fits, and every output
says so.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from eigenfilter.experiments import datasets
from eigenfilter.experiments.arguments import device_of, output_folder, positive, whole
from eigenfilter.experiments.errors import UserError, require
from eigenfilter.experiments.files import replace_text
from eigenfilter.experiments.reports import aligned
from eigenfilter.experiments.reproduce.plan import EXPERIMENTS, Plan
from eigenfilter.experiments.stopping import STOPPED, stopping

HELP = "the paper's experiments: MNIST, Fashion-MNIST, CIFAR-10"
PLAN = "plan.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS), metavar="EXPERIMENT")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder (default: out/reproduce-EXPERIMENT)"
    )
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="MINUTES",
        help="scale it down to about so long (default: in full)",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="the first (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=whole(1), metavar="N", help="runs at a time (default: by the cores)"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the data")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU)"
    )


def run(args: argparse.Namespace) -> int:
    """Run, measure, write; return the exit code."""
    require("matplotlib", "tqdm", "yaml")
    from eigenfilter.experiments.reproduce import execution, outputs, summary

    device = device_of(args.device)
    out = output_folder(args.out or Path("out") / f"reproduce-{args.experiment}")
    with stopping(args.budget) as stop:
        plan = _plan(args, out, device)
        print(f"{EXPERIMENTS[plan.experiment].title}, {plan.statement}", flush=True)
        runs = execution.execute(
            plan,
            out,
            processes=args.processes,
            data_dir=args.data_dir,
            device=args.device,
            stop=stop,
        )
    findings = outputs.Findings.of(plan, runs)
    outputs.write(findings, out)
    print(aligned(summary.table([row for row in findings.rows if row.best])))
    for line in findings.verdicts:
        print(line)
    print(f"{findings.title}\nwrote {', '.join(outputs.FILES)} in {out}")
    if not findings.complete:
        print("the same command goes on")
    return STOPPED if stop.signalled else 0


def _plan(args: argparse.Namespace, out: Path, device: torch.device) -> Plan:
    """The plan that `out` holds, else a new one, which is kept there.

    Raises:
        UserError: `out` holds that of another command.
    """
    from eigenfilter.experiments.reproduce import budget

    path = out / PLAN
    if path.exists():
        try:
            kept = Plan.of(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: remove {out}") from error
        for name in ("experiment", "budget", "seed"):
            there, here = getattr(kept, name), getattr(args, name)
            if there != here:
                raise UserError(
                    f"{out} holds a reproduction with {name} {there}, not {here}: "
                    "give it the same, or another --out"
                )
        return kept
    experiment = EXPERIMENTS[args.experiment]
    data = datasets.load(experiment.fixed["dataset"], args.data_dir)
    full = experiment.full_on(len(data.images))
    plan = Plan(args.experiment, args.seed, args.budget, full, full)
    if args.budget is not None:
        scale, seconds, rates = budget.fitted(
            experiment,
            full,
            args.budget,
            lambda model: budget.timed(experiment, full, model, data, device),
            processes=args.processes or _processes(experiment.fixed.get("threads", 0), device),
            tests=len(data.test_images),
        )
        plan = Plan(
            args.experiment, args.seed, args.budget, full, scale, seconds, vars(rates).copy()
        )
    replace_text(path, json.dumps(plan.as_dict(), indent=1) + "\n")
    return plan


def _processes(threads: int, device: torch.device) -> int:
    """How many runs go at a time where it is not said."""
    if device.type == "cuda":
        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // threads) if threads else 1
