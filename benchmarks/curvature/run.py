"""The largest eigenpairs of Hessians of trained networks, by the library and by its peers.

Every contender is checked against float64 before it is timed; see `report.LEGEND` in what is
written. The data are files of MNIST, Fashion-MNIST and CIFAR-10 in torchvision's layout, unpacked:
MNIST/raw, FashionMNIST/raw and cifar-10-batches-bin in the folder. Problems that need none are
mlp-digits and gpt-text. Peak memory is measured in a process for each contender. A large problem is
solved once by each, and whoever takes too long is stopped and said to be; the large ones take some
20 minutes and are left out unless --only names them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, report
from benchmarks.curvature import contest, tracking
from benchmarks.curvature import report as tables
from benchmarks.curvature.datasets import Missing
from benchmarks.curvature.problems import RECIPES
from benchmarks.curvature.thread import one_thread

TRACKING = "tracking"
ROUNDS = 3


def names() -> list[str]:
    """Return all there are."""
    return [*RECIPES, TRACKING]


def select(patterns: Sequence[str]) -> list[str]:
    """Return the names that match any of the patterns; all but the large if there are none.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(names(), pattern):
            raise ValueError(f"no problem {pattern!r}; there are {', '.join(names())}")
    if not patterns:
        return [name for name in names() if not tables.large([name])]
    return [name for name in names() if any(fnmatch.fnmatch(name, p) for p in patterns)]


def run(chosen: Sequence[str], data: Path, rounds: int, folder: Path) -> None:
    """Measure, print each table as it is there, write the results."""
    text: list[str] = []
    found: dict[str, Any] = {"curvature": [], "tracking": [], "absent": []}

    def tell(lines: list[str]) -> None:
        print("\n".join(lines), flush=True)
        text.extend(lines)

    with one_thread():
        where = environment.describe(torch.device("cpu"))
        for name in chosen:
            try:
                if name == TRACKING:
                    tracks = tracking.measure(RECIPES[tracking.TRACKED], data)
                    found["tracking"] = [asdict(track) for track in tracks]
                    tell(tables.tracks(found["tracking"]))
                else:
                    row = asdict(contest.measure(name, RECIPES[name], data, rounds))
                    found["curvature"].append(row)
                    tell(tables.table(row))
            except Missing as missing:
                found["absent"].append(f"{name}: {missing}")
                tell([f"{name}: {missing}", ""])
    title = ["# Eigenpairs of Hessians", "", tables.LEGEND]
    kind = "cpu-curvature-large" if tables.large(chosen) else "cpu-curvature"
    report.write(folder, kind, where, [*title, *text], found)
