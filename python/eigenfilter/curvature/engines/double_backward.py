"""Products through graphs of the first derivative, which are built once for many vectors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eigenfilter.curvature.engines.graphs import Graph, graph_of
from eigenfilter.curvature.engines.memory import graph_bytes
from eigenfilter.curvature.loss.batches import Pieces, Source, pieces, samples_of
from eigenfilter.curvature.loss.objective import Evaluation, Objective
from eigenfilter.curvature.loss.vectors import Sums, split

_logger = logging.getLogger(__name__)

WIDTH = 32  # vectors in one vectorised pass: more cost memory and gain nothing
_PROBE = 8  # a batch's memory is foretold from this fraction of its samples


class Graphs:
    """The graphs of all batches at one point: kept, as far as they fit, or built for each pass."""

    def __init__(
        self, objective: Objective, source: Source, params: Sequence[Tensor], budget: int
    ) -> None:
        """Keep graphs of up to `budget` bytes in all."""
        self.params = params
        self._objective = objective
        self._source = source
        self._free = budget
        self._kept: dict[int, tuple[Graph, float] | None] = {}  # None where nothing is weighed
        self._complete = False  # whether every batch has its graph kept

    def each(self) -> Iterator[tuple[Graph, float]]:
        """Yield each batch's graph and weight; drop a graph before asking for the next one."""
        if self._complete:
            yield from filter(None, self._kept.values())
            return
        index = -1
        for index, batch in enumerate(self._source.batches()):
            if index not in self._kept:
                evaluation = self._objective.evaluate(index, batch)
                weight = 1.0 if self._source.single else evaluation.weight()
                if weight == 0:
                    self._kept[index] = None
                    continue
                graph = graph_of(evaluation, self.params)
                del evaluation
                if self._free:
                    self._keep(index, graph, weight)
                yield graph, weight
                del graph
            elif (kept := self._kept[index]) is not None:
                yield kept
        self._complete = index + 1 == len(self._kept)

    def clear(self) -> None:
        """Keep none from here on."""
        self._kept.clear()
        self._complete, self._free = False, 0

    def _keep(self, index: int, graph: Graph, weight: float) -> None:
        size = graph_bytes(graph.roots, self._objective.tree.parameters())
        if size <= self._free:
            self._free -= size
            self._kept[index] = graph, weight


class DoubleBackward:
    """One backward pass a vector, or with `batched` one vectorised pass for up to WIDTH."""

    def __init__(self, graphs: Graphs, *, batched: bool = False) -> None:
        self._graphs = graphs
        self._batched = batched

    def multiply(self, V: Tensor) -> Sums:
        """Return the products with V [n, b], summed over batches."""
        params = self._graphs.params
        sums = Sums(V, params)
        block = split(V.T, params)
        batched = self._batched and V.shape[1] > 1
        for graph, weight in self._graphs.each():
            sums.weight += weight
            if batched:
                for first in range(0, V.shape[1], WIDTH):
                    part = slice(first, first + WIDTH)
                    products = graph.product([piece[part] for piece in block], batched=True)
                    sums.add(products, weight, part)
            else:
                for row in range(V.shape[1]):
                    sums.add(graph.product([piece[row] for piece in block]), weight, row)
            del graph
        return sums


def split_to_fit(
    objective: Objective, source: Source, params: Sequence[Tensor], budget: int
) -> Pieces:
    """Return the batches of `source` in pieces whose graphs take up to `budget` bytes each.

    Raises:
        ValueError: a batch cannot be split, or f on it is not the weighted mean (or sum) of f on
            its pieces: with batch statistics or dropout of mode="train", say.
    """
    batch, _ = first_batch(objective, source)
    size = piece_size(objective, batch, params, budget)
    whole = objective.value(0, batch)
    parts = [objective.value(0, piece) for piece in pieces(batch, size)]
    claimed = [part.claimed() for part in parts]
    weights = [w / sum(claimed) if objective.mean else w for w in claimed]
    shares = [w * float(part.total()) for w, part in zip(weights, parts, strict=True) if w]
    found = sum(shares)
    expected = float(whole.total())
    if math.isnan(expected) and math.isnan(found):  # which tells nothing of how it splits
        _logger.warning(
            "f is nan on a batch, as a mean over nothing is: of an ignored sample, say, that the "
            "empirical Fisher takes alone (a loss_fn with reduction='none' gives it 0)"
        )
        return Pieces(source, size)
    eps = torch.finfo(objective.autocast or params[0].dtype).eps
    if not abs(found - expected) <= eps**0.5 * max(map(abs, [expected, *shares])):
        raise ValueError(
            f"f is {expected:.6g} on a batch and {found:.6g} on its pieces: samples are coupled, "
            "by batch statistics or dropout say, or weigh otherwise than weight= and reduction= "
            "tell, so batches cannot be split: pass these, choose another engine, or make the "
            "batches smaller"
        )
    return Pieces(source, size)


def first_batch(
    objective: Objective, source: Source, *, graph: bool = False
) -> tuple[object, Evaluation]:
    """Return the first batch that weighs anything, evaluated; else the first."""
    first = None
    for batch in source.batches():
        if not graph and not objective.known.evaluated and (samples := samples_of(batch)):
            # A look at the model, of a part of the batch whose graph is built anyway.
            objective.evaluate(0, next(pieces(batch, -(-samples // _PROBE))))
        found = batch, (objective.evaluate if graph else objective.value)(0, batch)
        if source.single or found[1].claimed():
            return found
        first = first or found
    assert first is not None
    return first


def piece_size(objective: Objective, batch: object, params: Sequence[Tensor], budget: int) -> int:
    """Return for how many samples of a batch the graph takes up to `budget` bytes, 1 at least."""
    samples = samples_of(batch) or 1
    size = -(-samples // _PROBE)
    probe = next(pieces(batch, size))
    graph = graph_of(objective.evaluate(0, probe), params)
    used = graph_bytes(graph.roots, objective.tree.parameters())
    return max(1, min(samples, size * budget // max(used, 1)))
