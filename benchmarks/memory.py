"""The peak memory of a training step, in bytes a parameter.

Every optimizer steps in a process of its own, on float32 parameters unless its row has bfloat16.
Their gradients are new tensors at every backward pass and need no activations. The peak is the most
memory that the process (on a CPU: Linux' high-water mark of resident memory) or torch's allocator
(on a GPU) held, less what it held before it made the parameters. A float32 parameter takes 4 bytes,
so 16 is four copies.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import eigenfilter as ef
from benchmarks import environment, report
from benchmarks.environment import subprocess_environment
from benchmarks.peers import eight_bit
from benchmarks.peers.common_sam import CommonSAM
from eigenfilter import filters
from eigenfilter.optimizers import registry

SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
TENSORS = 8
ELEMENTS = 1 << 26
STEPS = 3

Make = Callable[[list[Parameter]], Any]


@dataclass(frozen=True)
class Row:
    """An optimizer to measure, and the dtype of its parameters."""

    make: Make
    dtype: torch.dtype = torch.float32


def _library() -> dict[str, Row]:
    """The library's optimizers by class, and their variants by options too."""
    rows: dict[str, Row] = {}
    for name in (*filters.METHODS, *registry.VARIANTS):
        method, options = registry.method_and_options(name)
        cls: Any = registry.OPTIMIZERS[method]
        rho = {"rho": 0.05} if method in registry.PERTURBATIONS else {}
        label = ", ".join([cls.__name__, *options])
        rows[label] = Row(functools.partial(cls, **SGD, **rho, **options))
    return rows


COMPRESSED: dict[str, Any] = {"master_weight_bits": 24, "state_bits": 8}


def _compressed() -> dict[str, Row]:
    """bfloat16 weights with masters of 24 bits, states of 8 bits."""
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "SGD": (ef.SGD, SGD),
        "USAM": (ef.USAM, USAM),
        "AdamW": (ef.AdamW, {}),
        "AdamW, method USAM": (ef.AdamW, {"rho": 0.05}),
    }
    rows = {}
    for name, (cls, own) in options.items():
        make = functools.partial(cls, **own, **COMPRESSED)
        label = f"{name}, 24-bit weights, 8-bit state"
        rows[label] = Row(make, torch.bfloat16)
        rows[f"{label}, released"] = _released(cls, torch.bfloat16, **own, **COMPRESSED)
    return rows


def _released(cls: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Row:
    return Row(functools.partial(cls, **options, release_gradients=True), dtype)


USAM: dict[str, Any] = {**SGD, "rho": 0.05}

OPTIMIZERS: dict[str, Row] = {
    "torch SGD, fused": Row(lambda p: torch.optim.SGD(p, **SGD, fused=True)),
    "torch SGD, foreach": Row(lambda p: torch.optim.SGD(p, **SGD, foreach=True)),
    **_library(),
    "SGD, no momentum": Row(lambda p: ef.SGD(p, lr=0.01)),
    "SGD, extrapolation": Row(lambda p: ef.SGD(p, **SGD, extrapolation=0.1)),
    "AdamW, extrapolation": Row(lambda p: ef.AdamW(p, extrapolation=0.01)),
    "SGD, gradients released": _released(ef.SGD, **SGD),
    "USAM, gradients released": _released(ef.USAM, **USAM),
    "TwoStepUSAM, gradients released": _released(ef.TwoStepUSAM, **USAM),
    "SGD, bfloat16": Row(lambda p: ef.SGD(p, **SGD), torch.bfloat16),
    "USAM, bfloat16": Row(lambda p: ef.USAM(p, **USAM), torch.bfloat16),
    "USAM, bfloat16, gradients released": _released(ef.USAM, torch.bfloat16, **USAM),
    "common SAM recipe": Row(lambda p: CommonSAM(p, "sam", 0.05, torch.optim.SGD, **SGD)),
    "SharpnessAware(torch SGD, fused)": Row(
        lambda p: ef.SharpnessAware(torch.optim.SGD(p, **SGD, fused=True), "sam")
    ),
    "torch AdamW, fused": Row(lambda p: torch.optim.AdamW(p, fused=True)),
    "AdamW": Row(lambda p: ef.AdamW(p)),
    "AdamW, gradients released": _released(ef.AdamW),
    "AdamW, method SAM": Row(lambda p: ef.AdamW(p, method="sam", rho=0.05)),
    "AdamW, method USAM, gradients released": _released(ef.AdamW, method="usam", rho=0.05),
    "AdamW, bfloat16": Row(lambda p: ef.AdamW(p), torch.bfloat16),
    **_compressed(),
    **{name: Row(make, torch.bfloat16) for name, make in eight_bit.OPTIMIZERS.items()},
}


class ConstantGradient(torch.autograd.Function):
    """A loss of 0 whose gradient is a new constant tensor; it stores no activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x
        return torch.zeros((), device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.full_like(ctx.like, 0.5)


class PeakMemory:
    """The most memory in use since `restart`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """Bytes in use now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS")

    def restart(self) -> None:
        """Start again from the memory in use now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def most(self) -> int:
        """The most bytes in use since `restart`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._status("VmHWM")

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024


def measure(name: str, elements: int, device: torch.device) -> float:
    """Return the peak bytes a parameter of one optimizer, measured in this process."""
    peak, row = PeakMemory(device), OPTIMIZERS[name]
    like: dict[str, Any] = {"dtype": row.dtype, "device": device}
    few = [Parameter(torch.ones(10, **like))]
    _train(row.make(few), few)  # now the libraries have allocated what they keep
    before = peak.now()
    params = [Parameter(torch.ones(elements // TENSORS, **like)) for _ in range(TENSORS)]
    opt = row.make(params)
    peak.restart()
    _train(opt, params)
    return (peak.most() - before) / elements


def _train(opt: Any, params: list[Parameter]) -> None:
    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = torch.stack([ConstantGradient.apply(p) for p in params]).sum()
        torch.autograd.backward(loss)
        return loss

    for _ in range(STEPS):
        if isinstance(opt, CommonSAM):
            closure()
            opt.ascend()
            closure()
            opt.restore_and_step()
        else:
            opt.step(closure)


def measure_in_new_process(name: str, elements: int, device: str = "cpu") -> float:
    """Run `measure` in a new process, whose freed memory goes back to the system at once."""
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name, str(elements), device],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=subprocess_environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return float(process.stdout)


def run(elements: int, device: torch.device, folder: Path) -> None:
    """Measure every optimizer, print the table, write the results."""
    where = environment.describe(device)
    rows = ["| optimizer | bytes a parameter |", "| --- | --- |"]
    print("\n".join(rows))
    peaks = {}
    for name in OPTIMIZERS:
        peaks[name] = measure_in_new_process(name, elements, str(device))
        rows.append(f"| {name} | {peaks[name]:.1f} |")
        print(rows[-1], flush=True)
    title = f"# Peak memory of a training step of {elements:,} parameters"
    data = {"device": device.type, "elements": elements, "memory": peaks}
    report.write(folder, f"{device.type}-memory", where, [title, "", *rows], data)


if __name__ == "__main__":  # in the process that `measure_in_new_process` starts
    print(measure(sys.argv[1], int(sys.argv[2]), torch.device(sys.argv[3])))
