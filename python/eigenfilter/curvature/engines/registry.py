"""The engines by name. An engine knows f at one point, and one way to multiply by its curvature."""

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
    """One way, at one point."""

    def multiply(self, V: Tensor) -> Sums:
        """Return sum_b w_b H_b V for V [n, b], and sum_b w_b."""


@dataclass(frozen=True)
class EngineInputs:
    """What an engine is made from.

    Attributes:
        objective: f.
        source: its batches.
        params: the parameters that C is taken in.
        budget: bytes that graphs may take.
        slices: of the vectors, where FSDP2 shards the parameters.
        graphs: one set of graphs for all engines that keep them.
    """

    objective: Objective
    source: BatchSource
    params: Sequence[Tensor]
    budget: int
    slices: ShardSlices | None
    graphs: GraphCache

    @property
    def f(self) -> tuple[Objective, BatchSource, Sequence[Tensor]]:
        """What every engine needs."""
        return self.objective, self.source, self.params


@dataclass(frozen=True)
class EngineSpec:
    """A way to multiply, for the documentation too.

    Attributes:
        name: what the argument `engine` of an operator says.
        make: makes the engine at a point.
        use: when to use it.
        cost: the time of a product, in products U through a graph built for it alone.
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
    """Decorate a function that makes an engine: `engine=name` of an operator then takes it."""

    def decorate(make: Callable[[EngineInputs], Engine]) -> Callable[[EngineInputs], Engine]:
        ENGINE_SPECS[name] = EngineSpec(name, make, use, cost, keeps_graphs)
        return make

    return decorate


def table() -> str:
    """The engines as a table in Markdown, for the documentation."""
    rows = [f"| `{kind.name}` | {kind.use} | {kind.cost} |" for kind in ENGINE_SPECS.values()]
    return "\n".join(["| engine | when | time of a product |", "| --- | --- | --- |", *rows])


class Engines:
    """The engines at one point, each made when it is first asked for."""

    def __init__(
        self,
        objective: Objective,
        source: BatchSource,
        params: Sequence[Tensor],
        budget: int,
        slices: ShardSlices | None = None,
    ) -> None:
        """Let graphs take up to `budget` bytes. With `slices`, only finite differences work."""
        self.objective, self.params = objective, params
        graphs = GraphCache(objective, source, params, budget)
        self._inputs = EngineInputs(objective, source, params, budget, slices, graphs)
        self._made: dict[str, Engine] = {}

    def __getitem__(self, name: str) -> Engine:
        if name not in self._made:
            self._made[name] = ENGINE_SPECS[name].make(self._inputs)
        return self._made[name]

    def drop(self, name: str) -> None:
        """Let go of what an engine that failed has built."""
        if self._made.pop(name, None) is not None and ENGINE_SPECS[name].keeps_graphs:
            self._inputs.graphs.clear()

    @property
    def error(self) -> float | None:
        """The estimated error of finite differences, if any were taken."""
        return getattr(self._made.get("finite_difference"), "error", None)
