"""The engines by name. An engine multiplies by the curvature of f at one x, in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from eigenfilter.curvature.engines.graph_cache import GraphCache
from eigenfilter.curvature.loss.batch_sources import BatchSource
from eigenfilter.curvature.loss.objective import Objective
from eigenfilter.curvature.loss.slices import ShardSlices
from eigenfilter.curvature.loss.vectors import Sums


class Engine(Protocol):
    """One way to multiply by the curvature of f, at one x."""

    def multiply(self, V: Tensor) -> Sums:
        """Return sum_b w_b H_b V for V [n, b], and sum_b w_b."""


@dataclass(frozen=True)
class EngineInputs:
    """The arguments of the function that creates an engine.

    Attributes:
        objective: the function f.
        source: the batches.
        params: the parameters that x consists of.
        budget: bytes that graphs may take.
        slices: how vectors are sliced, if FSDP2 shards the parameters.
        graphs: the graphs that all engines which keep graphs share.
    """

    objective: Objective
    source: BatchSource
    params: Sequence[Tensor]
    budget: int
    slices: ShardSlices | None
    graphs: GraphCache

    @property
    def f(self) -> tuple[Objective, BatchSource, Sequence[Tensor]]:
        """The objective, the batches and the parameters, which every engine needs."""
        return self.objective, self.source, self.params


@dataclass(frozen=True)
class EngineSpec:
    """The entry of an engine in the registry; the table of the documentation shows it.

    Attributes:
        name: the value of an operator's argument `engine`.
        make: function that creates the engine at one x.
        use: when to use the engine.
        cost: the time of a product, in units U of a product through a graph built for it alone.
        keeps_graphs: whether it keeps graphs from product to product.
    """

    name: str
    make: Callable[[EngineInputs], Engine]
    use: str
    cost: str
    keeps_graphs: bool


ENGINE_SPECS: dict[str, EngineSpec] = {}


def register(
    name: str, *, use: str, cost: str, keeps_graphs: bool = False
) -> Callable[[Callable[[EngineInputs], Engine]], Callable[[EngineInputs], Engine]]:
    """Register the decorated function, which creates an engine, as `engine=name` of operators.

    The other arguments are the attributes of `EngineSpec`.
    """

    def decorate(make: Callable[[EngineInputs], Engine]) -> Callable[[EngineInputs], Engine]:
        ENGINE_SPECS[name] = EngineSpec(name, make, use, cost, keeps_graphs)
        return make

    return decorate


def table() -> str:
    """Return a Markdown table of the engines, for the documentation."""
    rows = [f"| `{kind.name}` | {kind.use} | {kind.cost} |" for kind in ENGINE_SPECS.values()]
    return "\n".join(["| engine | when | time of a product |", "| --- | --- | --- |", *rows])


class Engines:
    """The engines at one x, each created on first use."""

    def __init__(
        self,
        objective: Objective,
        source: BatchSource,
        params: Sequence[Tensor],
        budget: int,
        slices: ShardSlices | None = None,
    ) -> None:
        """Prepare; graphs may take `budget` bytes. With `slices`, only finite differences work."""
        self.objective, self.params = objective, params
        graphs = GraphCache(objective, source, params, budget)
        self._inputs = EngineInputs(objective, source, params, budget, slices, graphs)
        self._engines: dict[str, Engine] = {}

    def __getitem__(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = ENGINE_SPECS[name].make(self._inputs)
        return self._engines[name]

    def drop(self, name: str) -> None:
        """Release the memory of an engine that failed."""
        if self._engines.pop(name, None) is not None and ENGINE_SPECS[name].keeps_graphs:
            self._inputs.graphs.clear()

    @property
    def error(self) -> float | None:
        """The estimated relative error of finite differences, if any were computed."""
        return getattr(self._engines.get("finite_difference"), "error", None)
