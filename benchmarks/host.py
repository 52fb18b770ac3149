"""What a launch costs the host: calls up to their launches, which are left out.

Runs on a machine without a GPU. Arguments are read and checked, batches filled or tables looked up,
kernels found, arguments copied: all that the host does before it hands a kernel to the driver,
which takes some microseconds more for every launch. Native launches end in `native_stub`, Triton's
in `triton_stub`.

Beside whole steps stand torch.optim's, foreach and fused, and beside the norm torch's own, with the
bodies of torch's operators left out: their Python alone. On a GPU each of these operators also
reads the lists and fills the arguments of its launches, so that torch's figures are bounds from
below, and the ratios bounds in torch's favor.
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
from benchmarks.contest import Contender, Phase, nothing
from benchmarks.timing import Lap, Spread, clock, interleave
from eigenfilter import kernels

BACKENDS = ("native", "triton")
COUNTS = (4, 2000)  # tensors
SIZE = 256
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
BASELINE = "torch foreach"
COLUMNS = ("call", "tensors", "by", "us", "launches", "KiB of arguments", f"{BASELINE} / this")
HEADER = (f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}")
LEGEND = f"""Microseconds of the host until a call has returned, medians with quartiles in brackets,
timed in turns on a machine without a GPU. No kernel runs. *native* does all that the compiled
extension does for tensors on a GPU, and copies the arguments of its launches, as a driver has to;
the driver's further work for each launch is left out. *triton* does all that Triton does up to its
launcher. Tensors have {SIZE} float32 elements each; none has moved since the last call.

`SGD.step` and `AdamW.step` are whole steps, of this library and of torch.optim; `norm` has
torch.nn.utils.get_total_norm beside it. Of torch's operators on lists the bodies are left out, so
that what is timed is their callers' Python alone: on a GPU each of them also reads the lists, fills
arguments and launches. Torch's times are bounds from below, and the ratios are in its favor.
"""

Call = Callable[[], object]
Counter = Callable[[], tuple[int, int]]
"""Returns the launches so far, and the bytes of their arguments."""


@dataclass(frozen=True)
class Cost:
    """What one call took.

    Attributes:
        call, tensors, by: which call, of how many tensors, done by whom.
        us: microseconds.
        launches, argument_bytes: of the call; None where they are left out.
        ratio: the time of torch's foreach path over this, round by round; None where it has none.
    """

    call: str
    tensors: int
    by: str
    us: Spread
    launches: int | None
    argument_bytes: int | None
    ratio: Spread | None


def row(cost: Mapping[str, Any]) -> str:
    """The line of the table for a `Cost` as the JSON file has it."""

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
    from benchmarks import triton_stub  # which needs triton

    with triton_stub.installed() as driver:
        yield lambda: (driver.launches, 0)


# Contexts in which a backend's launches are left out.
STUBS: Mapping[str, Callable[[], contextlib.AbstractContextManager[Counter]]] = {
    "native": _native,
    "triton": _triton,
}


def run(backends: Sequence[str], repeat: int | None, folder: Path) -> None:
    """Measure every call, print the table, write the results.

    Args:
        backends: of BACKENDS; "native" needs a process that has loaded `native_stub`.
        repeat: rounds of timing, or None for as many as a few seconds allow.
        folder: where the results go.
    """
    found = environment.describe(torch.device("cpu"))
    neighbours = environment.Neighbours()
    print("\n".join(HEADER), flush=True)
    costs: list[dict[str, Any]] = []
    for n in COUNTS:
        with contextlib.ExitStack() as stubs:
            counters = {name: stubs.enter_context(STUBS[name]()) for name in backends}
            calls = _calls(n, backends)  # with torch's own operators, for torch's first steps
            stubs.enter_context(mock.patch.multiple(torch, **_operators()))
            stubs.enter_context(mock.patch.object(torch.linalg, "vector_norm", _first))
            for call, ways in calls.items():
                own = [asdict(cost) for cost in _measure(call, n, ways, counters, repeat)]
                costs += own
                print("\n".join(map(row, own)), flush=True)
    busy = neighbours.cores()
    text = ["# What a launch costs the host", "", LEGEND, "", *HEADER, *map(row, costs)]
    text += ["", f"Meanwhile others kept {busy} cores busy."]
    report.write(folder, "cpu-host", found, text, {"host": costs, "neighbours": busy})


def _measure(
    call: str,
    n: int,
    ways: Mapping[str, Call],
    counters: Mapping[str, Counter],
    repeat: int | None,
) -> list[Cost]:
    """Time the ways to do a call in turns."""
    contenders = [Contender(by, (Phase(nothing, do),), list) for by, do in ways.items()]
    timer = clock("wall", torch.device("cpu"))
    laps = interleave(contenders, timer, repeat=repeat, budget=3.0)
    costs = []
    for by, do in ways.items():
        launches, size = _count(do, counters[by]) if by in counters else (None, None)
        us = Spread.of([1e6 * lap.seconds for lap in laps[by]])
        costs.append(Cost(call, n, by, us, launches, size, _ratio(laps, by)))
    return costs


def _count(do: Call, counter: Counter) -> tuple[int, int | None]:
    """The launches of a call, and the bytes of their arguments where the counter knows them."""
    launches, size = counter()
    do()
    after, size_after = counter()
    return after - launches, size_after - size or None


def _ratio(laps: Mapping[str, Sequence[Lap]], by: str) -> Spread | None:
    if by == BASELINE or BASELINE not in laps:
        return None
    pairs = zip(laps[BASELINE], laps[by], strict=True)
    return Spread.of([theirs.seconds / ours.seconds for theirs, ours in pairs])


def _calls(n: int, backends: Sequence[str]) -> dict[str, dict[str, Call]]:
    """By call: what does it, by who does."""
    x, g, m, v, b = ([torch.rand(SIZE) for _ in range(n)] for _ in range(5))

    def kernel(of: Callable[..., object], *lists: list[Tensor], **options: Any) -> dict[str, Call]:
        def by(backend: str) -> Call:
            return lambda: of(*lists, **options, backend=backend)

        return {backend: by(backend) for backend in backends}

    def steps(ours: Any, torchs: Any, options: dict[str, Any]) -> dict[str, Call]:
        own = {backend: ours(_parameters(n), **options, backend=backend) for backend in backends}
        peers = {
            f"torch {kind}": torchs(_parameters(n), **options, **{kind: True})
            for kind in ("foreach", "fused")
        }
        for peer in peers.values():
            peer.step()
        return {by: optimizer.step for by, optimizer in (own | peers).items()}

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


def _first(given: Any, *args: object, **kwargs: object) -> Any:
    """What stands for an operator, in place or not: it returns what it is given first."""
    return given


def _operators() -> dict[str, Any]:
    """By name: what stands for torch's operators on lists."""
    lists = [name for name in dir(torch) if name.startswith(("_foreach_", "_fused_"))]
    return dict.fromkeys([*lists, "stack"], _first)
