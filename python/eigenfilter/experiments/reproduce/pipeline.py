"""Execution of a plan: for one seed after another, all trainings and then their spectra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eigenfilter.experiments.devices import device_of
from eigenfilter.experiments.reproduce import spectra
from eigenfilter.experiments.reproduce.plan import EXPERIMENTS, Plan
from eigenfilter.experiments.reproduce.summary import RunResult
from eigenfilter.experiments.sweep import execution as sweep
from eigenfilter.experiments.sweep.folders import folder_of
from eigenfilter.experiments.sweep.progress import SweepProgress


def execute(
    plan: Plan,
    out: Path,
    *,
    processes: int | None,
    data_dir: Path | None,
    device: str,
    stop: Callable[[], bool],
) -> list[RunResult]:
    """Execute the runs that are not complete, and measure missing spectra.

    The order is seed by seed, so that all methods have results for the same seeds if time runs out.

    Args:
        plan: the plan.
        out: folder of the reproduction, whose lock the caller has. Each run has a folder
            `runs/NAME` with its spectrum.
        processes: runs at a time; None means as many as fit.
        data_dir: data folder.
        device: see `sweep.execution.execute`.
        stop: called several times a second, and between spectra.

    Returns:
        The results of all runs in the order of seeds. Runs that were stopped are "unfinished".
    """
    experiment = EXPERIMENTS[plan.experiment]
    place = device_of(device)
    runs: list[RunResult] = []
    count = len(list(experiment.variants())) * plan.scale.seeds
    with SweepProgress(2 * count, unit="") as progress:
        for seed in plan.seeds:
            progress.bar.set_description(f"seed {seed}, training")
            records = sweep.execute(
                experiment.runs(plan.scale, seed),
                out,
                processes=processes,
                data_dir=data_dir,
                device=device,
                stop=stop,
                observe=progress.observe,
                already_locked=True,
            )
            progress.bar.set_description(f"seed {seed}, spectra")
            for name, record in records.items():
                spectrum = None
                if record["outcome"] == "complete":
                    folder, settings = folder_of(out, name), plan.scale.spectrum
                    spectrum = spectra.load_spectrum(folder, settings)
                    if spectrum is None and not stop():
                        spectrum = spectra.measure_spectrum(
                            folder, settings, data_dir=data_dir, device=place
                        )
                runs.append(RunResult.of(name, record, spectrum))
                if runs[-1].outcome != "unfinished":
                    progress.bar.update()
    return runs
