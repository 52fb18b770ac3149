"""Train many configurations with many seeds; print one table.

SWEEP.yaml says what is trained:

    base: {dataset: digits, model: mlp-64, epochs: 20}
    grid: {optimizer: [sgd, usam], lr: [0.05, 0.1]}
    seeds: 3

Each run has a process and a folder of its own, --out/runs/NAME. The same command again goes on with
what was interrupted, tries again what failed, and runs what the file has more; nothing is run
twice. Ctrl-C saves a checkpoint of every run and stops.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from eigenfilter.experiments import config as configs
from eigenfilter.experiments.cli_arguments import add_data_dir, add_device, add_out, positive, whole
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import one_line, require
from eigenfilter.experiments.files import replace_text
from eigenfilter.experiments.interrupts import StopCondition, graceful_stop

HELP = "train a grid or a random sample of configurations, on all cores, GPUs or a Ray cluster"
TABLE = "table.md"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="base, grid, random, seeds")
    add_out(parser, "out/sweep", "the runs, results.json and table.md")
    parser.add_argument(
        "--processes",
        type=whole(1),
        metavar="N",
        help="runs at once (default: one a GPU, or as many as the cores have threads for)",
    )
    parser.add_argument(
        "--budget", type=positive, metavar="MINUTES", help="stop after so long, as by Ctrl-C"
    )
    parser.add_argument(
        "--retries",
        type=whole(0),
        default=1,
        metavar="N",
        help="of a run whose process ended, from its checkpoint (default: %(default)s)",
    )
    add_data_dir(parser)
    add_device(parser, auto="every GPU")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="spread the runs over a Ray cluster: auto, local or HOST:PORT; its nodes share --out",
    )
    configs.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run what has not been run yet, and write the table; return the exit code."""
    require("yaml", "tqdm")
    from eigenfilter.experiments.locks import folder_lock
    from eigenfilter.experiments.sweep import search_space

    wanted = search_space.read(args.sweep, configs.from_flags(args))
    with folder_lock(args.out, "sweep"):
        return _run(args, search_space.assign_names(wanted, args.out))


def _run(args: argparse.Namespace, chosen: dict[str, Config]) -> int:
    from eigenfilter.experiments import runs
    from eigenfilter.experiments.reporting import align_columns, save_results
    from eigenfilter.experiments.sweep import table
    from eigenfilter.experiments.sweep.execution import execute
    from eigenfilter.experiments.sweep.progress import SweepProgress

    with graceful_stop(args.budget) as stop, SweepProgress(len(chosen)) as progress:
        records = execute(
            chosen,
            args.out,
            processes=args.processes,
            ray=args.ray,
            data_dir=args.data_dir,
            device=args.device,
            retries=args.retries,
            stop=stop,
            observe=progress.observe,
            already_locked=True,
        )
    rows = table.rows(chosen, records)
    save_results(args.out / runs.RESULTS, "sweep", {"table": rows, "runs": records})
    lines = table.cells(rows)
    replace_text(args.out / TABLE, table.markdown(lines))
    print(align_columns(lines))
    return _close(args.out, records, stop)


def _close(out: Path, records: dict[str, dict[str, Any]], stop: StopCondition) -> int:
    """Say what failed and what was not finished; give the exit code."""
    for name, record in records.items():
        if record["outcome"] == "failed":
            print(one_line(f"{name} failed: {record['error']}"))
    left = sum(record["outcome"] == "stopped" for record in records.values())
    if left:
        print(f"stopped, {left} of {len(records)} runs to go: the same command goes on with them")
    else:
        print(f"wrote {out / TABLE}, results.json and runs")
    failed = any(r["outcome"] == "failed" and not r["diverged"] for r in records.values())
    return stop.exit_code(left=left > 0, failed=failed)
