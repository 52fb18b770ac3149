"""Verify benchmarks, time them, and write the results as they come in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import environment, registry, report
from benchmarks.comparison import Benchmark
from benchmarks.measure import BenchmarkResult, measure


def run(
    benchmarks: Sequence[Benchmark], device: torch.device, repeat: int | None, folder: Path
) -> bool:
    """Run benchmarks; print and write each result at once.

    If the run is stopped, the files have all results so far and say that they are incomplete.

    Args:
        benchmarks: the benchmarks.
        device: the device; each benchmark runs with each backend that has kernels for it.
        repeat: rounds of timing, or None for as many as a few seconds allow.
        folder: the folder for the results.

    Returns:
        Whether every verification passed.
    """
    where = environment.describe(device)
    print("\n".join(report.HEADER))
    files = report.ResultFiles(folder, device.type, where)
    results: list[BenchmarkResult] = []
    pairs = list(itertools.product(benchmarks, registry.settings(device)))
    _save(files, results, len(pairs))
    for benchmark, setting in pairs:
        results.append(measure(benchmark, setting, repeat=repeat))
        print("\n".join(report.lines(results[-1])), flush=True)
        _save(files, results, len(pairs))
    files.print_paths()
    return all(result.timing is not None for result in results)


def _save(files: report.ResultFiles, results: Sequence[BenchmarkResult], total: int) -> None:
    rows = [line for result in results for line in report.lines(result)]
    note = report.incomplete(len(results), total, "timings")
    text = ["# Benchmarks", *note, "", report.LEGEND, "", *report.HEADER, *rows]
    data = {
        "complete": len(results) == total,
        "results": [asdict(result) for result in results],
    }
    files.save(text, data)
