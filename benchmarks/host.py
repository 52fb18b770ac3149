"""What a kernel launch costs the host: calls are timed up to the launch, which is left out.

This runs on a machine without a GPU. It times all that the host does before it passes a kernel to
the driver: it reads and checks arguments, fills batches or looks up tables, selects kernels and
copies arguments. The driver takes some microseconds more for every launch. Native launches end in
`native_stub`, Triton's in `triton_stub`.

Whole steps are compared with torch.optim's, foreach and fused, and the norm with torch's own. The
bodies of torch's operators are left out, so only their Python is timed. On a GPU each of these
operators also reads the lists and fills the arguments of its launches. So torch's times are lower
bounds, and the ratios favor torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import eigenfilter
from benchmarks import environment, native_stub, report
from benchmarks.comparison import Contender, Phase, do_nothing
from benchmarks.timing import Spread, Timing, clock, interleave
from eigenfilter import kernels

BACKENDS = ("native", "triton")
COUNTS = (4, 2000)  # numbers of tensors
SIZE = 256  # elements of a tensor
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
BASELINE = "torch foreach"
COLUMNS = ("call", "tensors", "by", "us", "launches", "KiB of arguments", f"{BASELINE} / this")
HEADER = (f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}")
LEGEND = f"""Microseconds of the host until a call has returned: medians with quartiles in brackets,
timed in turns on a machine without a GPU. No kernel runs. *native* does all that the compiled
extension does for tensors on a GPU, and copies the arguments of its launches, as a driver has to.
The driver's further work for each launch is left out. *triton* does all that Triton does up to its
launcher. Each tensor has {SIZE} float32 elements and the same address as in the call before.

`SGD.step` and `AdamW.step` are whole steps, of this library and of torch.optim. `norm` is compared
with torch.nn.utils.get_total_norm. The bodies of torch's operators on lists are left out, so only
the Python of their callers is timed. On a GPU each of them also reads the lists, fills arguments
and launches. So torch's times are lower bounds, and the ratios favor torch.
"""

Call = Callable[[], object]
Counter = Callable[[], tuple[int, int]]
"""Returns the number of launches so far, and the bytes of their arguments."""


@dataclass(frozen=True)
class CallCost:
    """The host's time for one call.

    Attributes:
        call: the function or method.
        tensors: how many tensors it gets.
        by: the backend, or torch's implementation.
        us: microseconds.
        launches: launches of the call; None if they are not counted.
        argument_bytes: bytes of the launches' arguments; None if they are not counted.
        ratio: the time of torch's foreach implementation over this one, round by round; None if
            torch has none.
    """

    call: str
    tensors: int
    by: str
    us: Spread
    launches: int | None
    argument_bytes: int | None
    ratio: Spread | None


def row(cost: Mapping[str, Any]) -> str:
    """The table's row for a `CallCost` that was read from JSON."""

    def spread(values: Mapping[str, float] | None, digits: str) -> str:
        if values is None:
            return ""
        low, median, high = (format(values[q], digits) for q in ("low", "median", "high"))
        return f"{median} [{low}, {high}]"

    launches, size = cost["launches"], cost["argument_bytes"]
    cells = (
        f"`{cost['call']}`",
        f"{cost['tensors']:,}",
        cost["by"],
        spread(cost["us"], ",.0f"),
        "" if launches is None else str(launches),
        "" if size is None else f"{size / 1024:.1f}",
        spread(cost["ratio"], ".2f"),
    )
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def _native() -> Iterator[Counter]:
    yield native_stub.counts


@contextlib.contextmanager
def _triton() -> Iterator[Counter]:
    from benchmarks import triton_stub  # needs triton

    with triton_stub.installed() as driver:
        yield lambda: (driver.launches, 0)


# By backend: a context that leaves out its launches, and counts them.
STUBS: Mapping[str, Callable[[], contextlib.AbstractContextManager[Counter]]] = {
    "native": _native,
    "triton": _triton,
}


def run(backends: Sequence[str], repeat: int | None, folder: Path) -> None:
    """Measure every call, print the table, write the results.

    Args:
        backends: names from BACKENDS; "native" needs a process that has loaded `native_stub`.
        repeat: rounds of timing, or None for as many as a few seconds allow.
        folder: the folder for the results.
    """
    where = environment.describe(torch.device("cpu"))
    machine_load = environment.MachineLoad()
    print("\n".join(HEADER), flush=True)
    costs: list[dict[str, Any]] = []
    for n in COUNTS:
        with contextlib.ExitStack() as stubs:
            counters = {name: stubs.enter_context(STUBS[name]()) for name in backends}
            calls = _calls(n, backends)  # before the patches: torch's first steps are real ones
            stubs.enter_context(mock.patch.multiple(torch, **_list_operator_stubs()))
            stubs.enter_context(
                mock.patch.object(torch.linalg, "vector_norm", _return_first_argument)
            )
            for call, implementations in calls.items():
                rows = [
                    asdict(cost) for cost in _measure(call, n, implementations, counters, repeat)
                ]
                costs += rows
                print("\n".join(map(row, rows)), flush=True)
    busy = machine_load.busy_cores()
    text = ["# What a launch costs the host", "", LEGEND, "", *HEADER, *map(row, costs)]
    text += ["", f"Other processes kept {busy} cores busy meanwhile."]
    report.write(folder, "cpu-host", where, text, {"host": costs, "busy_cores": busy})


def _measure(
    call: str,
    n: int,
    implementations: Mapping[str, Call],
    counters: Mapping[str, Counter],
    repeat: int | None,
) -> list[CallCost]:
    """Time the implementations of a call in turns."""
    contenders = [
        Contender(by, (Phase(do_nothing, run_call),), list)
        for by, run_call in implementations.items()
    ]
    timer = clock("wall", torch.device("cpu"))
    timings = interleave(contenders, timer, repeat=repeat, budget=3.0)
    costs = []
    for by, run_call in implementations.items():
        launches, size = _count(run_call, counters[by]) if by in counters else (None, None)
        us = Spread.of([1e6 * timing.seconds for timing in timings[by]])
        costs.append(CallCost(call, n, by, us, launches, size, _ratio(timings, by)))
    return costs


def _count(run_call: Call, counter: Counter) -> tuple[int, int | None]:
    """The launches of a call, and the bytes of their arguments if the counter knows them."""
    launches_before, size_before = counter()
    run_call()
    launches, size = counter()
    return launches - launches_before, size - size_before or None


def _ratio(timings: Mapping[str, Sequence[Timing]], by: str) -> Spread | None:
    if by == BASELINE or BASELINE not in timings:
        return None
    pairs = zip(timings[BASELINE], timings[by], strict=True)
    return Spread.of([theirs.seconds / ours.seconds for theirs, ours in pairs])


def _calls(n: int, backends: Sequence[str]) -> dict[str, dict[str, Call]]:
    """By call, then by backend or torch's implementation: a function that makes the call."""
    x, g, m, v, b = ([torch.rand(SIZE) for _ in range(n)] for _ in range(5))

    def kernel(
        function: Callable[..., object], *lists: list[Tensor], **options: Any
    ) -> dict[str, Call]:
        def on(backend: str) -> Call:
            return lambda: function(*lists, **options, backend=backend)

        return {backend: on(backend) for backend in backends}

    def steps(library_class: Any, torch_class: Any, options: dict[str, Any]) -> dict[str, Call]:
        library = {
            backend: library_class(_parameters(n), **options, backend=backend)
            for backend in backends
        }
        peers = {
            f"torch {kind}": torch_class(_parameters(n), **options, **{kind: True})
            for kind in ("foreach", "fused")
        }
        for peer in peers.values():
            peer.step()
        return {by: optimizer.step for by, optimizer in (library | peers).items()}

    adamw = {**ADAMW, "step": 7}
    norm = {BASELINE: lambda: torch.nn.utils.get_total_norm(g, foreach=True)}
    return {
        "perturb": kernel(kernels.perturb, x, g, b, alpha=0.1),
        "sgd_step": kernel(kernels.sgd_step, x, g, m, b, **SGD),
        "adamw_step": kernel(kernels.adamw_step, x, g, m, v, b, **adamw),
        "norm": kernel(kernels.norm, g) | norm,
        "SGD.step": steps(eigenfilter.SGD, torch.optim.SGD, SGD),
        "AdamW.step": steps(eigenfilter.AdamW, torch.optim.AdamW, ADAMW),
    }


def _parameters(n: int) -> list[Tensor]:
    parameters = [torch.rand(SIZE, requires_grad=True) for _ in range(n)]
    for p in parameters:
        p.grad = torch.rand(SIZE)
    return parameters


def _return_first_argument(first: Any, *args: object, **kwargs: object) -> Any:
    """A stub for an operator, in place or not: return the first argument."""
    return first


def _list_operator_stubs() -> dict[str, Any]:
    """A stub for each of torch's operators on lists, by name."""
    names = [name for name in dir(torch) if name.startswith(("_foreach_", "_fused_"))]
    return dict.fromkeys([*names, "stack"], _return_first_argument)
