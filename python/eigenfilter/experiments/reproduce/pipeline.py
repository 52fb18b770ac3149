"""All runs of a plan, a seed after the other, with the spectra at their ends."""

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
    """Run what is not complete, measure what was not measured.

    Seed by seed, so that what stands when time runs out has every method.

    Args:
        plan: what is run.
        out: its folder, which the caller is alone in; runs go into `runs/NAME`, the spectrum of
            each beside it.
        processes: at a time; None: as many as fit.
        data_dir: of the data.
        device: as in `sweep.execution.execute`.
        stop: asked several times a second, and between spectra.

    Returns:
        Every run of the plan, in the order of seeds; "unfinished" where it was stopped before.
    """
    experiment = EXPERIMENTS[plan.experiment]
    place = device_of(device)
    runs: list[RunResult] = []
    count = len(list(experiment.variants())) * plan.scale.seeds
    with SweepProgress(2 * count, unit="") as progress:
        for seed in plan.seeds:
            progress.bar.set_description(f"seed {seed}, training")
            found = sweep.execute(
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
            for name, record in found.items():
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
