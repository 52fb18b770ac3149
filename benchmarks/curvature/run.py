"""The largest eigenpairs of Hessians of trained networks, by the library and by its peers.

Every contender is checked against float64 before it is timed; the results explain the columns. The
data are files of MNIST, Fashion-MNIST and CIFAR-10 in torchvision's layout, unpacked: MNIST/raw,
FashionMNIST/raw and cifar-10-batches-bin in the folder. The problems mlp-digits and gpt-text need
no files. Each contender's peak memory is measured in a process of its own. On a large problem each
contender solves once, and one that takes too long is stopped and reported as stopped. The large
problems take some 20 minutes; they are left out unless --only names them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, report
from benchmarks.curvature import solver_comparison, tables, tracking
from benchmarks.curvature.problem_data import MissingRequirement
from benchmarks.curvature.problems import RECIPES
from benchmarks.curvature.single_thread import single_thread

TRACKING = "tracking"
ROUNDS = 3


def names() -> list[str]:
    """Return the names of all problems, and of the tracking."""
    return [*RECIPES, TRACKING]


def select(patterns: Sequence[str]) -> list[str]:
    """Return the names that match any of the patterns, or all but large problems for none.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(names(), pattern):
            raise ValueError(f"no problem {pattern!r}: choose from {', '.join(names())}")
    if not patterns:
        return [name for name in names() if not tables.all_large([name])]
    return [name for name in names() if any(fnmatch.fnmatch(name, p) for p in patterns)]


def run(selection: Sequence[str], data: Path, rounds: int, folder: Path) -> None:
    """Measure, print each table at once, and write the results at the end.

    Args:
        selection: names of problems, and of the tracking.
        data: the folder of the data.
        rounds: rounds of timing.
        folder: the folder for the results.
    """
    text: list[str] = []
    results: dict[str, Any] = {"curvature": [], "tracking": [], "absent": []}

    def show(lines: list[str]) -> None:
        print("\n".join(lines), flush=True)
        text.extend(lines)

    with single_thread():
        where = environment.describe(torch.device("cpu"))
        for name in selection:
            try:
                if name == TRACKING:
                    tracks = tracking.measure(RECIPES[tracking.PROBLEM], data)
                    results["tracking"] = [asdict(track) for track in tracks]
                    show(tables.tracking_table(results["tracking"]))
                else:
                    row = asdict(solver_comparison.measure(name, RECIPES[name], data, rounds))
                    results["curvature"].append(row)
                    show(tables.table(row))
            except MissingRequirement as missing:
                results["absent"].append(f"{name}: {missing}")
                show([f"{name}: {missing}", ""])
    title = ["# Eigenpairs of Hessians", "", tables.LEGEND]
    kind = "cpu-curvature-large" if tables.all_large(selection) else "cpu-curvature"
    report.write(folder, kind, where, [*title, *text], results)
