"""Many runs in one folder, on this machine or a cluster; nothing is run twice."""

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
    """Run every configuration in a folder of its own, `out/runs/NAME`, and a process of its own.

    What is complete there is read, what was interrupted goes on from its checkpoint. A run whose
    process ends (killed, as by the system where memory is short, or by an exception) is tried again
    from its checkpoint; one that ends with an error of its user, as when it diverges or its batch
    does not fit into memory, is not. Neither touches the others.

    Args:
        runs: name -> configuration. A name is that of a folder.
        out: the folder of all; only one process may be at work in it.
        processes: how many at once; None: as many as the cores (or GPUs) allow with
            `config.threads`.
        ray: address of a Ray cluster that the runs are spread over: "auto", "local" or that of
            its head. `out` and `data_dir` are folders that its nodes share.
        data_dir: of the data, see `datasets.folder_of`.
        device: "cpu", "cuda:1"; "cuda": every GPU, which processes share in turn; "auto": those
            if there are any.
        retries: how often a run is tried again after its process ended.
        stop: asked several times a second; once it says True, every run writes a checkpoint and
            ends.
        observe: gets the records of every run's log as they come: name, kind, step, values; the
            kinds of `runs.run`, "waiting" once another command is in the run's folder for some
            seconds, with its `holder`, "retry" with the error, "end" with the results, and "kept"
            with those that were there.
        held: whether the caller is alone in `out` already.

    Returns:
        The results of each, in the order of `runs`: `outcome` is "complete", "stopped" (to be gone
        on with), or "failed" with `error`, one line, `diverged` and `attempts`. One that diverged
        is not run again by the next call, others are.

    Raises:
        UserError: another is at work in `out`; a folder holds a run of another configuration, or a
            damaged one; data are missing. Whatever is raised, no process is left behind.

    Example:
        >>> found = execute({f"seed={s}": Config(seed=s, threads=1) for s in range(3)}, Path("out"))
        >>> [record["test"]["accuracy"] for record in found.values()]
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
    """What is to be run, and what need not be; the data are there."""
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
        datasets.load(dataset, data_dir)  # once, where it has to be downloaded
    return specs, records
