"""Products by a second backward pass, through graphs of the first derivative."""

from __future__ import annotations

from torch import Tensor

from eigenfilter.curvature.engines.graph_cache import GraphCache
from eigenfilter.curvature.engines.microbatching import split_to_fit
from eigenfilter.curvature.engines.registry import EngineInputs, register
from eigenfilter.curvature.loss.vectors import Sums, split

WIDTH = 32  # vectors in one vectorized pass: more cost memory and gain nothing


class DoubleBackward:
    """One backward pass for each vector, or with `batched` a vectorized one for up to WIDTH."""

    def __init__(self, graphs: GraphCache, *, batched: bool = False) -> None:
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


@register(
    "cached_graph",
    use="the graph of the data fits in memory",
    cost="0.6 to 0.7 U",
    keeps_graphs=True,
)
def _cached_graph(inputs: EngineInputs) -> DoubleBackward:
    return DoubleBackward(inputs.graphs)


@register(
    "vmap",
    use="blocks of vectors on small operations",
    cost="0.4 U to 1 U a vector",
    keeps_graphs=True,
)
def _vmap(inputs: EngineInputs) -> DoubleBackward:
    return DoubleBackward(inputs.graphs, batched=True)


@register("per_pass_graph", use="blocks, nothing kept", cost="1 U, a vector of eight 0.5 to 0.7 U")
def _per_pass_graph(inputs: EngineInputs) -> DoubleBackward:
    return DoubleBackward(GraphCache(*inputs.f, 0))


@register(
    "microbatched",
    use="one batch's graph does not fit",
    cost="1 U and more, by the number of pieces",
)
def _microbatched(inputs: EngineInputs) -> DoubleBackward:
    batches = split_to_fit(*inputs.f, inputs.budget)
    return DoubleBackward(GraphCache(inputs.objective, batches, inputs.params, 0))
