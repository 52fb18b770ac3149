"""All runs of a plan, a seed after the other, with the spectra at their ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eigenfilter.experiments.arguments import device_of
from eigenfilter.experiments.reproduce.plan import EXPERIMENTS, Plan
from eigenfilter.experiments.reproduce.spectra import spectrum_of
from eigenfilter.experiments.reproduce.summary import Measured
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep import execution as sweep
from eigenfilter.experiments.sweep.folders import folder_of


def execute(
    plan: Plan,
    out: Path,
    *,
    processes: int | None,
    data_dir: Path | None,
    device: str,
    stop: Callable[[], bool],
) -> list[Measured]:
    """Run what is not complete, measure what was not measured.

    Seed by seed, so that what stands when time runs out has every method.

    Args:
        plan: what is run.
        out: its folder; runs go into `runs/NAME`, the spectrum of each beside it.
        processes: at a time; None: as many as fit.
        data_dir: of the data.
        device: as in `sweep.execution.execute`.
        stop: asked several times a second, and between spectra.

    Returns:
        Every run of the plan, in the order of seeds; "unfinished" where it was stopped before.
    """
    from tqdm import tqdm

    experiment = EXPERIMENTS[plan.experiment]
    place = device_of(device)
    measured: list[Measured] = []
    count = len(list(experiment.variants())) * plan.scale.seeds
    with tqdm(total=2 * count, unit="", leave=False, disable=None) as bar:

        def ended(name: str, kind: str, step: int, record: Record) -> None:
            if kind == "retry":
                bar.write(f"{name}: {record['error']}: once more")
            if kind == "end":
                bar.update()
                bar.write(f"{name}: {_words(record)}")

        for seed in plan.seeds:
            bar.set_description(f"seed {seed}, training")
            found = sweep.execute(
                experiment.runs(plan.scale, seed),
                out,
                processes=processes,
                data_dir=data_dir,
                device=device,
                stop=stop,
                observe=ended,
            )
            # Runs that were complete before do not end again.
            bar.update(2 * len(measured) + len(found) - bar.n)
            bar.set_description(f"seed {seed}, spectra")
            for name, record in found.items():
                spectrum = None
                if record["outcome"] == "complete" and not stop():
                    spectrum = spectrum_of(
                        folder_of(out, name), plan.scale.spectrum, data_dir=data_dir, device=place
                    )
                bar.update()
                measured.append(Measured.of(name, record, spectrum))
    return measured


def _words(record: Record) -> str:
    if record["outcome"] == "complete":
        return f"test accuracy {record['test']['accuracy']:.2%} in {record['seconds']:.1f} s"
    return str(record.get("error", record["outcome"]))
