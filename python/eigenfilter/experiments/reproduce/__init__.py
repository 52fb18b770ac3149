"""Reproduce an experiment of the paper: MNIST, Fashion-MNIST or CIFAR-10.

The command trains with every method, radius, momentum and seed, measures the Hessian of each
network at the end, and writes results.json, summary.md, spectra.png and report.html. Running it
again resumes interrupted runs. --budget scales the experiment down to a time limit; --seeds,
--epochs, --model, --samples and --spectrum-samples scale it by hand. Every output states the scale.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from eigenfilter.experiments import datasets, networks
from eigenfilter.experiments.cli_arguments import add_data_dir, add_device, positive, whole
from eigenfilter.experiments.devices import device_of
from eigenfilter.experiments.errors import UserError, require
from eigenfilter.experiments.files import read_json, replace_text
from eigenfilter.experiments.interrupts import graceful_stop
from eigenfilter.experiments.locks import LOCK as LOCK
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.reporting import align_columns
from eigenfilter.experiments.reproduce.findings import Findings
from eigenfilter.experiments.reproduce.plan import COARSER, EXPERIMENTS, ExperimentScale, Plan
from eigenfilter.experiments.schema import validate

HELP = "the paper's experiments: MNIST, Fashion-MNIST, CIFAR-10"
PLAN = "plan.json"
SPENT = "spent.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "experiment",
        choices=tuple(EXPERIMENTS),
        metavar="EXPERIMENT",
        help="one of %(choices)s",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the reproduction (default: out/reproduce-EXPERIMENT)",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="MINUTES",
        help="scale the experiment down to about this time (default: run it in full)",
    )
    for name, text in (
        ("seeds", "number of seeds (default: that of the experiment)"),
        ("epochs", "number of epochs (default: that of the experiment)"),
        ("samples", "number of the first training images to use (default: all)"),
        ("spectrum-samples", "largest number of images for spectra; fewer give coarser spectra"),
    ):
        parser.add_argument(f"--{name}", type=whole(1), metavar="N", help=text)
    parser.add_argument("--model", metavar="NAME", help="network (default: that of the experiment)")
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="first seed (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=whole(1),
        metavar="N",
        help="runs at a time (default: one per GPU, or the CPU cores over the threads of a run)",
    )
    add_data_dir(parser)
    add_device(parser, auto="every GPU")


def run(args: argparse.Namespace) -> int:
    """Train, measure and write the results; return the exit code."""
    require("matplotlib", "tqdm", "yaml")
    device = device_of(args.device)
    out = args.out or Path("out") / f"reproduce-{args.experiment}"
    with folder_lock(out, "reproduction"):
        return _reproduce(args, out, device)


def _reproduce(args: argparse.Namespace, out: Path, device: torch.device) -> int:
    from eigenfilter.experiments.reproduce import outputs, pipeline, summary

    with graceful_stop(args.budget) as stop:
        plan = _load_or_make_plan(args, out, device)
        print(f"{EXPERIMENTS[plan.experiment].title}, {plan.statement}", flush=True)
        with _track_seconds(out / SPENT) as spent:
            runs = pipeline.execute(
                plan,
                out,
                processes=args.processes,
                data_dir=args.data_dir,
                device=args.device,
                stop=stop,
            )
    findings = Findings.of(plan, runs, spent())
    outputs.write(findings, out)
    print(align_columns(summary.table([row for row in findings.rows if row.best])))
    for line in findings.verdicts:
        print(line)
    print(f"{findings.title}\nwrote {', '.join(outputs.FILES)} in {out}")
    if not findings.complete:
        print("some runs are unfinished; run the command again to continue")
    return stop.exit_code(unfinished=not findings.complete, failed=findings.failed)


@contextmanager
def _track_seconds(path: Path) -> Iterator[Callable[[], float]]:
    """Add the time inside the context to the time of earlier commands, which a file stores.

    Yields:
        A function that returns the stored time in seconds.
    """

    def spent() -> float:
        try:
            content = read_json(path, "remove it")
            validate(content, {"seconds": float}, "it")
        except FileNotFoundError:
            return 0.0
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); remove it") from error
        return float(content["seconds"])

    before, began = spent(), time.perf_counter()
    try:
        yield spent
    finally:
        seconds = before + time.perf_counter() - began
        replace_text(path, json.dumps({"seconds": seconds}) + "\n")


def _load_or_make_plan(args: argparse.Namespace, out: Path, device: torch.device) -> Plan:
    """Read the plan in `out`, or make a new one and write it there.

    Raises:
        UserError: the plan in `out` differs from the arguments, or is damaged.
    """
    from eigenfilter.experiments.reproduce import budget
    from eigenfilter.experiments.sweep.local import default_processes

    path = out / PLAN
    if path.exists():
        try:
            stored = Plan.of(read_json(path, f"remove {out}"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); remove {out}") from error
        for name in ("experiment", "budget", "seed"):
            before, now = getattr(stored, name), getattr(args, name)
            if before != now:
                raise UserError(
                    f"{out} contains a reproduction with {name} {before}, not {now}; "
                    "give the same, or another --out"
                )
        scale = _requested_scale(args, stored.full)
        if args.budget is None and stored.scale != scale:
            raise UserError(
                f"{out} contains a reproduction {stored.statement}; "
                "give the same scale, or another --out"
            )
        return stored
    experiment = EXPERIMENTS[args.experiment]
    data = datasets.load(experiment.fixed["dataset"], args.data_dir)
    full = experiment.full_on(len(data.images))
    plan = Plan(args.experiment, args.seed, args.budget, full, _requested_scale(args, full))
    if args.budget is not None:
        scale, seconds, rates = budget.fit_to_budget(
            experiment,
            full,
            args.budget,
            lambda model: budget.measure_rates(experiment, full, model, data, device),
            processes=args.processes
            or default_processes(args.device, experiment.runs(full, args.seed).values()),
            tests=len(data.test_images),
        )
        plan = Plan(
            args.experiment, args.seed, args.budget, full, scale, seconds, vars(rates).copy()
        )
    replace_text(path, json.dumps(plan.as_dict(), indent=1) + "\n")
    return plan


def _requested_scale(args: argparse.Namespace, full: ExperimentScale) -> ExperimentScale:
    """Return the scale that the arguments describe.

    Raises:
        UserError: a budget is given too, or there is no such network, or there are fewer images.
    """
    flags = {name: getattr(args, name) for name in ("seeds", "epochs", "model", "samples")}
    flags = {name: value for name, value in flags.items() if value is not None}
    if args.budget is not None and (flags or args.spectrum_samples):
        raise UserError("--budget chooses the scale itself; leave it out, or the scale")
    if args.model is not None:
        try:
            networks.parse(args.model)
        except ValueError as error:
            raise UserError(f"--model {error}") from error
    scale = replace(full, **flags)
    if scale.samples > full.samples:
        raise UserError(f"--samples must be at most {full.samples}, not {scale.samples}")
    max_samples = min(scale.samples, args.spectrum_samples or full.spectrum.samples)
    spectra = (full.spectrum, *COARSER)
    spectrum = next((s for s in spectra if s.samples <= max_samples), COARSER[-1])
    return replace(scale, spectrum=replace(spectrum, samples=min(spectrum.samples, max_samples)))
