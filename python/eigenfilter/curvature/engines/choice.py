"""Which engine to use: the memory of a graph and a short timing on the first batch decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from eigenfilter.curvature.engines.derivative_graphs import graph_of
from eigenfilter.curvature.engines.double_backward import WIDTH
from eigenfilter.curvature.engines.forward_mode import ForwardOverReverse
from eigenfilter.curvature.engines.memory import graph_bytes
from eigenfilter.curvature.engines.microbatching import first_batch, split_to_fit
from eigenfilter.curvature.loss.batch_sources import BatchSource, InMemoryBatches
from eigenfilter.curvature.loss.objective import Objective
from eigenfilter.curvature.loss.vectors import split

_logger = logging.getLogger(__name__)

# Finite differences come last, since they are not exact.
ORDER = (
    "cached_graph",
    "per_pass_graph",
    "forward_over_reverse",
    "microbatched",
    "finite_difference",
)
# The order if a graph is too large for the budget.
_SMALL = ("microbatched", "forward_over_reverse", "finite_difference")

_GROWTH = 3  # bytes of the graph of a derivative, relative to those of the value's graph, about
_LONG = 0.1  # seconds of a product in which arithmetic dominates, so that vectorizing gains nothing
_MARGIN = 1.3  # how much faster than a cached graph others must be, because one timing is noisy


def choose(
    objective: Objective,
    source: BatchSource,
    params: Sequence[Tensor],
    budget: int,
    vectors: int,
) -> tuple[str, ...]:
    """Return the names of engines for this number of vectors, the fastest exact one first.

    The others follow in case it fails. If the graphs of all batches fit `budget`, they are built
    once for each x; else once for each pass over the data.
    """
    batch, evaluation = first_batch(objective, source, graph=True)
    first = objective, InMemoryBatches([batch], pairs=False), params
    weights = list(objective.tree.parameters())
    # An estimate: the budget may be there to prevent that a graph which does not fit is built.
    size = _GROWTH * graph_bytes([evaluation.value], weights)
    if size > budget:
        del evaluation
        try:
            split_to_fit(*first, budget)
        except ValueError as error:
            why = f"a graph exceeds the budget; {error}"
            return _log_choice("forward_over_reverse", vectors, why, _SMALL)
        why = f"a graph takes {size} bytes, above the budget"
        return _log_choice("microbatched", vectors, why, _SMALL)

    if vectors == 1 and source.count is not None and source.count * size <= budget:
        return _log_choice("cached_graph", vectors, f"its graphs, of about {size} bytes each, fit")
    V = torch.ones(sum(p.numel() for p in params), min(vectors, WIDTH), dtype=params[0].dtype)
    V = V.to(params[0].device)
    block = split(V.T, params)
    graph = graph_of(evaluation, params)
    size = graph_bytes(graph.roots, weights)
    single = _seconds(lambda: graph.product([piece[0] for piece in block]), V.device)
    fit = source.count is not None and source.count * size <= budget
    build = 0.0
    if not fit:
        build = _seconds(lambda: graph_of(objective.evaluate(0, batch), params), V.device)
    times = {"cached_graph": build + vectors * single}
    failures: list[str] = []
    wide = V.shape[1]
    if wide > 1 and single < _LONG and wide * size <= budget:
        with _trial("vmap", failures):
            together = _seconds(lambda: graph.product(block, batched=True), V.device)
            times["vmap"] = build + vectors / wide * together
    if not fit:
        with _trial("forward_over_reverse", failures):
            engine = ForwardOverReverse(*first)
            forward = _seconds(lambda: engine.multiply(V[:, :1]), V.device)
            times["forward_over_reverse"] = vectors * forward
    best = min(times, key=lambda name: times[name] * (1 if name == "cached_graph" else _MARGIN))
    timings = [f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items()]
    return _log_choice(best, vectors, "; ".join([*timings, f"{size} bytes a graph", *failures]))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run` takes: the better of two runs, or of one if it is long."""
    times: list[float] = []
    while len(times) < 2 and (not times or times[0] < _LONG):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@contextmanager
def _trial(name: str, failures: list[str]) -> Iterator[None]:
    """Record why an engine cannot be used, instead of raising.

    Warnings pass through. Torch's warning that it loops over vectors shows in the time, too.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        failures.append(f"{name} refused: {str(error).splitlines()[0]}")


def _log_choice(
    name: str, vectors: int, reason: str, others: Sequence[str] = ORDER
) -> tuple[str, ...]:
    _logger.info("products with %d vectors: engine %r (%s)", vectors, name, reason)
    return name, *(other for other in others if other != name)
