"""Peak memory of a training step, in bytes a parameter, measured.

Every optimizer steps in a process of its own on float32 parameters whose gradients are new tensors
at every backward pass and need no activations. Peak is what the process (CPU: resident memory, with
Linux' high-water mark) or torch's allocator (GPU) held at most, less what it held before there were
any parameters. Parameters take 4 bytes, so 16 is four copies of them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import eigenfilter as ef
from benchmarks import environment, report
from benchmarks.environment import own_process
from benchmarks.peers.common_sam import CommonSAM

SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
TENSORS = 8
ELEMENTS = 1 << 26
STEPS = 3

OPTIMIZERS: dict[str, Callable[[list[Parameter]], Any]] = {
    "torch SGD, fused": lambda p: torch.optim.SGD(p, **SGD, fused=True),
    "torch SGD, foreach": lambda p: torch.optim.SGD(p, **SGD, foreach=True),
    "SGD": lambda p: ef.SGD(p, **SGD),
    "SGD, gradients released": lambda p: ef.SGD(p, **SGD, release_gradients=True),
    "USAM": lambda p: ef.USAM(p, **SGD, rho=0.05),
    "USAM, gradients released": lambda p: ef.USAM(p, **SGD, rho=0.05, release_gradients=True),
    "SAM": lambda p: ef.SAM(p, **SGD, rho=0.05),
    "SAM, adaptive": lambda p: ef.SAM(p, **SGD, rho=0.05, adaptive=True),
    "TwoStepUSAM": lambda p: ef.TwoStepUSAM(p, **SGD, rho=0.05),
    "HessianUSAM": lambda p: ef.HessianUSAM(p, **SGD, rho=0.05),
    "common SAM recipe": lambda p: CommonSAM(p, "sam", 0.05, torch.optim.SGD, **SGD),
    "SharpnessAware(torch SGD, fused)": lambda p: ef.SharpnessAware(
        torch.optim.SGD(p, **SGD, fused=True), "sam"
    ),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW": lambda p: ef.AdamW(p),
    "AdamW, gradients released": lambda p: ef.AdamW(p, release_gradients=True),
    "AdamW, method SAM": lambda p: ef.AdamW(p, method="sam", rho=0.05),
}


class Gradient(torch.autograd.Function):
    """0 x, with a gradient that is a new tensor and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x
        return torch.zeros((), device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.full_like(ctx.like, 0.5)


class Peak:
    """The most memory in use since `restart`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """Bytes in use."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS")

    def restart(self) -> None:
        """Forget higher marks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def most(self) -> int:
        """Bytes in use at most since then."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._status("VmHWM")

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024


def measure(name: str, elements: int, device: torch.device) -> float:
    """Peak bytes a parameter of one optimizer, in this process."""
    peak = Peak(device)
    warm = [Parameter(torch.ones(10, device=device))]
    _train(OPTIMIZERS[name](warm), warm)  # what the libraries allocate once
    before = peak.now()
    params = [Parameter(torch.ones(elements // TENSORS, device=device)) for _ in range(TENSORS)]
    opt = OPTIMIZERS[name](params)
    peak.restart()
    _train(opt, params)
    return (peak.most() - before) / elements


def _train(opt: Any, params: list[Parameter]) -> None:
    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = torch.stack([Gradient.apply(p) for p in params]).sum()
        torch.autograd.backward(loss)
        return loss

    for _ in range(STEPS):
        if isinstance(opt, CommonSAM):
            closure()
            opt.ascend()
            closure()
            opt.descend()
        else:
            opt.step(closure)


def measure_apart(name: str, elements: int, device: str = "cpu") -> float:
    """`measure` in a process of its own, whose freed memory goes back to the system at once."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name, str(elements), device],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=own_process() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return float(done.stdout)


def run(elements: int, device: torch.device, folder: Path) -> None:
    """Measure every optimizer, print the table, write the results."""
    found = environment.describe(device)
    rows = ["| optimizer | bytes a parameter |", "| --- | --- |"]
    print("\n".join(rows))
    measured = {}
    for name in OPTIMIZERS:
        measured[name] = measure_apart(name, elements, str(device))
        rows.append(f"| {name} | {measured[name]:.1f} |")
        print(rows[-1], flush=True)
    title = f"# Peak memory of a training step of {elements:,} parameters"
    data = {"device": device.type, "elements": elements, "memory": measured}
    report.write(folder, f"{device.type}-memory", found, [title, "", *rows], data)


if __name__ == "__main__":  # the process of `measure_apart`
    print(measure(sys.argv[1], int(sys.argv[2]), torch.device(sys.argv[3])))
