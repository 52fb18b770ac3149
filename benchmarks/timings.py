"""Verify benchmarks, time them, write the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from eigenfilter.benchmarks import environment, registry, report
from eigenfilter.benchmarks.contest import Benchmark
from eigenfilter.benchmarks.measure import Result, measure


def run(
    benchmarks: Sequence[Benchmark], device: torch.device, repeat: int | None, folder: Path
) -> bool:
    """Run benchmarks; a result is printed as soon as it is there.

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
    results: list[Result] = []
    for benchmark in benchmarks:
        for setting in registry.settings(device):
            results.append(measure(benchmark, setting, repeat=repeat))
            print("\n".join(report.lines(results[-1])), flush=True)
    rows = [line for result in results for line in report.lines(result)]
    text = ["# Benchmarks", "", report.LEGEND, "", *report.HEADER, *rows]
    data = {"results": [asdict(result) for result in results]}
    report.write(folder, device.type, found, text, data)
    return all(result.timing is not None for result in results)
