"""The graphs of the first derivative of all batches, at one point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from eigenfilter.curvature.engines.derivative_graphs import Graph, graph_of
from eigenfilter.curvature.engines.memory import graph_bytes
from eigenfilter.curvature.loss.batch_sources import BatchSource
from eigenfilter.curvature.loss.objective import Objective


class GraphCache:
    """The graphs of all batches at one point: kept, as far as they fit, or built for each pass."""

    def __init__(
        self, objective: Objective, source: BatchSource, params: Sequence[Tensor], budget: int
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
