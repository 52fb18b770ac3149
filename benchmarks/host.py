"""What a launch costs the host: calls up to their launches, which are left out.

Runs on a machine without a GPU. Arguments are read and checked, tables looked up, compiled kernels
found: all that the host does before it hands a kernel to the driver, which takes some microseconds
more. Triton's launches end in `triton_stub`. Beside them, torch.optim's foreach path with the
bodies of its `_foreach` operators left out, its Python alone: on a GPU it also reads the lists once
for each of its operators, so that its figures are bounds from below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from eigenfilter import kernels
from eigenfilter.benchmarks import environment, report
from eigenfilter.benchmarks.contest import Contender, Phase
from eigenfilter.benchmarks.timing import Spread, clock, interleave

COUNTS = (4, 2000)  # tensors
SIZE = 256
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}


def _triton() -> contextlib.AbstractContextManager[object]:
    from eigenfilter.benchmarks import triton_stub  # which needs triton

    return triton_stub.installed()


# Contexts in which a backend's launches are left out.
STUBS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {"triton": _triton}


def run(repeat: int | None, folder: Path) -> None:
    """Measure every call, print the table, write the results."""
    device = torch.device("cpu")
    found = environment.describe(device)
    backends = list(STUBS)
    rows = ["| call | tensors | by | us |", f"|{' --- |' * 4}"]
    costs = []
    for n in COUNTS:
        calls = _calls(n, backends)
        with contextlib.ExitStack() as stubs:
            stubs.enter_context(mock.patch.multiple(torch, **_foreach()))
            for stub in STUBS.values():
                stubs.enter_context(stub())
            for call, ways in calls.items():
                contenders = [
                    Contender(by, (Phase(_nothing, do),), list) for by, do in ways.items()
                ]
                laps = interleave(contenders, clock("wall", device), repeat=repeat, budget=3.0)
                for by, taken in laps.items():
                    us = Spread.of([1e6 * lap.seconds for lap in taken])
                    costs.append({"call": call, "tensors": n, "by": by, "us": asdict(us)})
                    spread = f"{us.median:.3g} [{us.low:.3g}, {us.high:.3g}]"
                    rows.append(f"| {call} | {n} | {by} | {spread} |")
    print("\n".join(rows))
    title = "# What a launch costs the host"
    report.write(folder, "cpu-host", found, [title, "", *rows], {"host": costs})


def _nothing() -> None:
    pass


def _calls(n: int, backends: Sequence[str]) -> dict[str, dict[str, Callable[[], object]]]:
    """By call: what does it, by who does."""
    x, g, m, v, b = ([torch.rand(SIZE) for _ in range(n)] for _ in range(5))

    def ours(kernel: Callable[..., None], *lists: list[Tensor], **options: Any) -> dict[str, Any]:
        def of(backend: str) -> Callable[[], object]:
            return lambda: kernel(*lists, **options, backend=backend)

        return {backend: of(backend) for backend in backends}

    adamw = {**ADAMW, "step": 7}
    return {
        "ascend": ours(kernels.ascend, x, g, b, alpha=0.1),
        "descend": ours(kernels.descend, x, g, m, b, **SGD)
        | {"torch.optim.SGD": _step(torch.optim.SGD(_parameters(n), **SGD, foreach=True))},
        "descend_adamw": ours(kernels.descend_adamw, x, g, m, v, b, **adamw)
        | {"torch.optim.AdamW": _step(torch.optim.AdamW(_parameters(n), **ADAMW, foreach=True))},
    }


def _parameters(n: int) -> list[Tensor]:
    parameters = [torch.rand(SIZE, requires_grad=True) for _ in range(n)]
    for p in parameters:
        p.grad = torch.rand(SIZE)
    return parameters


def _step(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """The step of an optimizer that has taken one, and so has its state."""
    optimizer.step()
    return optimizer.step


def _first(tensors: Sequence[Tensor], *args: object, **kwargs: object) -> Sequence[Tensor]:
    """What stands for an operator, in place or not: it returns its first list."""
    return tensors


def _foreach() -> dict[str, Any]:
    """By name: what stands for torch's operators on lists."""
    return {name: _first for name in dir(torch) if name.startswith("_foreach_")}
