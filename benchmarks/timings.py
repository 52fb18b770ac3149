"""Verify benchmarks, time them, write the results as they come."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import environment, registry, report
from benchmarks.contest import Benchmark
from benchmarks.measure import Result, measure


def run(
    benchmarks: Sequence[Benchmark], device: torch.device, repeat: int | None, folder: Path
) -> bool:
    """Run benchmarks; a result is printed and written as soon as it is there.

    If the run is stopped, what it has measured is in the files, which say that they are incomplete.

    Args:
        benchmarks: which.
        device: where; each of its backends has its turn.
        repeat: rounds of timing, or None for as many as a few seconds allow.
        folder: where the results go.

    Returns:
        Whether every check was green.
    """
    found = environment.describe(device)
    print("\n".join(report.HEADER))
    files = report.Files(folder, device.type, found)
    results: list[Result] = []
    pairs = list(itertools.product(benchmarks, registry.settings(device)))
    _save(files, results, len(pairs))
    for benchmark, setting in pairs:
        results.append(measure(benchmark, setting, repeat=repeat))
        print("\n".join(report.lines(results[-1])), flush=True)
        _save(files, results, len(pairs))
    files.name()
    return all(result.timing is not None for result in results)


def _save(files: report.Files, results: Sequence[Result], of: int) -> None:
    rows = [line for result in results for line in report.lines(result)]
    missing = report.incomplete(len(results), of, "timings")
    text = ["# Benchmarks", *missing, "", report.LEGEND, "", *report.HEADER, *rows]
    data = {
        "complete": len(results) == of,
        "results": [asdict(result) for result in results],
    }
    files.save(text, data)
