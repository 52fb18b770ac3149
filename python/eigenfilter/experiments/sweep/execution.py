"""Execution of many runs in one folder, on this machine or a cluster, without repeating any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

from eigenfilter.experiments import datasets
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import require
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep import local
from eigenfilter.experiments.sweep.folders import RunSpec, folder_of, load_finished
from eigenfilter.experiments.sweep.run_queue import Observe, RunQueue


def execute(
    runs: Mapping[str, Config],
    out: Path,
    *,
    processes: int | None = None,
    ray: str | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    retries: int = 1,
    stop: Callable[[], bool] = lambda: False,
    observe: Observe = lambda name, kind, step, record: None,
    already_locked: bool = False,
) -> dict[str, Record]:
    """Execute every configuration in its own folder, `out/runs/NAME`, and its own process.

    Complete runs are read, and interrupted runs resume from their checkpoints. If the process of a
    run ends early (an exception, or a kill by the system when memory is short), the run is retried
    from its checkpoint. A run that ends with a UserError, such as divergence or a batch that does
    not fit into memory, is not retried. Other runs are not affected.

    Args:
        runs: configurations by name, which is also the name of a folder.
        out: the folder of all runs; only one process may work in it.
        processes: number of runs at a time; None means as many as the GPUs, or the CPU cores with
            `config.threads` each, allow.
        ray: address of a Ray cluster that executes the runs: "auto", "local" or that of its head.
            Its nodes must share the folders `out` and `data_dir`.
        data_dir: data folder; see `datasets.folder_of`.
        device: "cpu", "cuda:1", "cuda" for all GPUs, among which runs are distributed, or "auto"
            for all GPUs if there are any.
        retries: number of retries of a run whose process ended.
        stop: called several times a second. When it returns True, every run writes a checkpoint
            and ends.
        observe: called with the name of a run and the kind, step and values of each record: the
            kinds of `runs.run`; "waiting" with the `holder` if another command has had the lock of
            the run's folder for some seconds; "retry" with the error; "end" with the results; and
            "kept" with results that existed before.
        already_locked: whether the caller has the lock of `out`.

    Returns:
        The results of each run in the order of `runs`. `outcome` is "complete", "stopped" or
        "failed", the last with `error` (one line), `diverged` and `attempts`. The next call resumes
        stopped runs and retries failed ones, except those that diverged.

    Raises:
        UserError: another process works in `out`; a folder contains a run of another configuration
            or a damaged file; data are missing. No process is left running after any exception.

    Example:
        >>> runs = {f"seed={s}": Config(seed=s, threads=1) for s in range(3)}
        >>> records = execute(runs, Path("out"))
        >>> [record["test"]["accuracy"] for record in records.values()]
    """
    if ray is not None:
        require("ray", extra="ray")
    with nullcontext() if already_locked else folder_lock(out, "sweep"):
        specs, records = _prepare_runs(runs, out, data_dir, device, observe)
        queue = RunQueue(specs, retries, observe)
        if specs and ray is None:
            local.execute(queue, processes=processes, device=device, stop=stop)
        elif specs and ray is not None:
            from eigenfilter.experiments.sweep import cluster

            cluster.execute(queue, address=ray, processes=processes, device=device, stop=stop)
        records |= queue.records
    return {name: records[name] for name in runs}


def _prepare_runs(
    runs: Mapping[str, Config], out: Path, data_dir: Path | None, device: str, observe: Observe
) -> tuple[dict[str, RunSpec], dict[str, Record]]:
    """Return the runs to execute and the records of finished ones, after loading the data once."""
    specs: dict[str, RunSpec] = {}
    records: dict[str, Record] = {}
    for name, config in runs.items():
        folder = folder_of(out, name)
        finished = load_finished(config, folder)
        if finished is None:
            specs[name] = RunSpec(config, folder, data_dir, device)
        else:
            records[name] = finished
            observe(name, "kept", finished["step"], finished)
    for dataset in sorted({spec.config.dataset for spec in specs.values()}):
        datasets.load(dataset, data_dir)  # download it before the runs start
    return specs, records
