"""Reproductions that are small enough for tests, on digits instead of the paper's data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from eigenfilter.experiments.cli import main
from eigenfilter.experiments.reproduce.plan import Experiment, ExperimentScale, SpectrumSettings

SPECTRUM = SpectrumSettings(samples=60, pairs=3, probes=1, steps=8)
TINY = Experiment(
    title="Digits",
    fixed={"dataset": "digits", "batch_size": 50, "activation": "relu", "threads": 1},
    lr={0.0: 0.5, 0.9: 0.05},
    rhos={
        "sam": (0.05,),
        "usam": (0.05, 0.1),
        "two_step_usam": (0.05,),
        "hessian_usam": (0.05, 1e30),  # the second moves the weights to where nothing is finite
    },
    full=ExperimentScale(seeds=2, epochs=2, model="mlp-8", samples=200, spectrum=SPECTRUM),
    narrower=("mlp-4",),
    least=100,
)
DIVERGING = 1e30
STABLE = replace(TINY, rhos={**TINY.rhos, "hessian_usam": (0.05,)})
VARIANTS = 14


def reproduce(folder: Path, *options: str, name: str = "mnist") -> int:
    options = ("--processes", "1", "--device", "cpu", "--seed", "3", *options)
    return main(["reproduce", name, "--out", str(folder), *options])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
