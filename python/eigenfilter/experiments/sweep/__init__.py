"""Train many configurations with many seeds, and print a table of the results.

SWEEP.yaml defines the configurations:

    base: {dataset: digits, model: mlp-64, epochs: 20}
    grid: {optimizer: [sgd, usam], lr: [0.05, 0.1]}
    seeds: 3

Each run has its own process and its own folder, --out/runs/NAME. Running the command again resumes
interrupted runs, retries failed ones and adds new ones from the file; no run is repeated. Ctrl-C
saves a checkpoint of every run and stops.
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
    parser.add_argument(
        "sweep",
        type=Path,
        metavar="SWEEP.yaml",
        help="file with base, grid, random and seeds; see above",
    )
    add_out(parser, "out/sweep", "the runs, results.json and table.md")
    parser.add_argument(
        "--processes",
        type=whole(1),
        metavar="N",
        help="runs at a time (default: one per GPU, or the CPU cores over the threads of a run)",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="MINUTES",
        help="time limit, after which the sweep stops as at Ctrl-C",
    )
    parser.add_argument(
        "--retries",
        type=whole(0),
        default=1,
        metavar="N",
        help="retries of a run whose process ended, from its checkpoint (default: %(default)s)",
    )
    add_data_dir(parser)
    add_device(parser, auto="every GPU")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster (auto, local or HOST:PORT) whose nodes share --out",
    )
    configs.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the configurations that are not complete, and write the table; return the exit code."""
    require("yaml", "tqdm")
    from eigenfilter.experiments.locks import folder_lock
    from eigenfilter.experiments.sweep import search_space

    configurations = search_space.read(args.sweep, configs.from_flags(args))
    with folder_lock(args.out, "sweep"):
        return _run(args, search_space.assign_names(configurations, args.out))


def _run(args: argparse.Namespace, configs_by_name: dict[str, Config]) -> int:
    from eigenfilter.experiments import runs
    from eigenfilter.experiments.reporting import align_columns, save_results
    from eigenfilter.experiments.sweep import table
    from eigenfilter.experiments.sweep.execution import execute
    from eigenfilter.experiments.sweep.progress import SweepProgress

    with graceful_stop(args.budget) as stop, SweepProgress(len(configs_by_name)) as progress:
        records = execute(
            configs_by_name,
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
    rows = table.rows(configs_by_name, records)
    save_results(args.out / runs.RESULTS, "sweep", {"table": rows, "runs": records})
    lines = table.cells(rows)
    replace_text(args.out / TABLE, table.markdown(lines))
    print(align_columns(lines))
    return _close(args.out, records, stop)


def _close(out: Path, records: dict[str, dict[str, Any]], stop: StopCondition) -> int:
    """Print what failed and what is unfinished; return the exit code."""
    for name, record in records.items():
        if record["outcome"] == "failed":
            print(one_line(f"{name} failed: {record['error']}"))
    unfinished = sum(record["outcome"] == "stopped" for record in records.values())
    if unfinished:
        print(f"stopped with {unfinished} of {len(records)} runs unfinished; run the command again")
    else:
        print(f"wrote {out / TABLE}, results.json and runs")
    failed = any(r["outcome"] == "failed" and not r["diverged"] for r in records.values())
    return stop.exit_code(unfinished=unfinished > 0, failed=failed)
