"""The graphs of the first derivative of all batches, at one x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from eigenfilter.curvature.engines.derivative_graphs import Graph, graph_of
from eigenfilter.curvature.engines.memory import graph_bytes
from eigenfilter.curvature.loss.batch_sources import BatchSource
from eigenfilter.curvature.loss.objective import Objective


class GraphCache:
    """The graphs of all batches at one x: kept as far as they fit, else built for each pass."""

    def __init__(
        self, objective: Objective, source: BatchSource, params: Sequence[Tensor], budget: int
    ) -> None:
        """Keep graphs of at most `budget` bytes in total."""
        self.params = params
        self._objective = objective
        self._source = source
        self._free = budget
        self._graphs: dict[int, tuple[Graph, float] | None] = {}  # None for a batch of weight 0
        self._complete = False  # whether the graphs of all batches are kept

    def each(self) -> Iterator[tuple[Graph, float]]:
        """Yield each batch's graph and weight; the caller drops it before it asks for the next."""
        if self._complete:
            yield from filter(None, self._graphs.values())
            return
        index = -1
        for index, batch in enumerate(self._source.batches()):
            if index not in self._graphs:
                evaluation = self._objective.evaluate(index, batch)
                weight = 1.0 if self._source.single else evaluation.weight()
                if weight == 0:
                    self._graphs[index] = None
                    continue
                graph = graph_of(evaluation, self.params)
                del evaluation
                if self._free:
                    self._keep(index, graph, weight)
                yield graph, weight
                del graph
            elif (cached := self._graphs[index]) is not None:
                yield cached
        self._complete = index + 1 == len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs, and keep none from now on."""
        self._graphs.clear()
        self._complete, self._free = False, 0

    def _keep(self, index: int, graph: Graph, weight: float) -> None:
        size = graph_bytes(graph.roots, self._objective.tree.parameters())
        if size <= self._free:
            self._free -= size
            self._graphs[index] = graph, weight
