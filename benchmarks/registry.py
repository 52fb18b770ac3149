"""All benchmarks by name, and the settings in which they run."""

from __future__ import annotations

import fnmatch
import importlib.util

import torch

from benchmarks import kernels, lanczos_kernels, optimizers, training
from benchmarks.comparison import Benchmark, Setting
from eigenfilter import _core
from eigenfilter.kernels import dispatch

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        *optimizers.BENCHMARKS,
        *training.BENCHMARKS,
        *kernels.BENCHMARKS,
        *lanczos_kernels.BENCHMARKS,
    )
}


def select(patterns: list[str]) -> list[Benchmark]:
    """Return the benchmarks whose names match any of the patterns ("usam-*"), or all for none.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(BENCHMARKS, pattern):
            raise ValueError(f"no benchmark {pattern!r} (see eigenfilter bench --list)")
    return [
        benchmark
        for name, benchmark in BENCHMARKS.items()
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


def settings(device: torch.device) -> list[Setting]:
    """Return the settings for a device: one for each backend with kernels for it."""
    if device.type == "cpu":
        return [Setting(device, "native")]
    backends = ["native"] if _core.cuda_compiled and dispatch.missing_code(device) is None else []
    if importlib.util.find_spec("triton") is not None:
        backends.append("triton")
    return [Setting(device, backend) for backend in backends]
