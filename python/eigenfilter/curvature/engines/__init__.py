"""Ways to multiply by a curvature matrix. An engine knows f at one point, and one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from eigenfilter.curvature.engines.double_backward import DoubleBackward, Graphs, split_to_fit
from eigenfilter.curvature.engines.finite_difference import FiniteDifference
from eigenfilter.curvature.engines.forward_mode import ForwardOverReverse
from eigenfilter.curvature.engines.sharded import ShardedDifference
from eigenfilter.curvature.loss.batches import Source
from eigenfilter.curvature.loss.objective import Objective
from eigenfilter.curvature.loss.slices import ShardSlices
from eigenfilter.curvature.loss.vectors import Sums

NAMES = (
    "retained",
    "shared",
    "batched",
    "forward_over_reverse",
    "finite_difference",
    "checkpointed",
)


class Engine(Protocol):
    """One way, at one point."""

    def multiply(self, V: Tensor) -> Sums:
        """Return sum_b w_b H_b V for V [n, b], and sum_b w_b."""


class Engines:
    """The engines at one point, each made when it is first asked for."""

    def __init__(
        self,
        objective: Objective,
        source: Source,
        params: Sequence[Tensor],
        budget: int,
        slices: ShardSlices | None = None,
    ) -> None:
        """Let graphs take up to `budget` bytes. With `slices`, only finite differences work."""
        self.objective, self.params = objective, params
        self._given = objective, source, params
        self._budget = budget
        self._slices = slices
        self._made: dict[str, Engine] = {}
        self._kept = Graphs(*self._given, budget)  # one set for all engines that keep graphs

    def __getitem__(self, name: str) -> Engine:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def drop(self, name: str) -> None:
        """Let go of what an engine that failed has built."""
        if self._made.pop(name, None) is not None and name in ("retained", "batched"):
            self._kept.clear()

    @property
    def error(self) -> float | None:
        """The estimated error of finite differences, if any were taken."""
        made = self._made.get("finite_difference")
        return made.error if isinstance(made, FiniteDifference) else None

    def _make(self, name: str) -> Engine:
        objective, source, params = self._given
        match name:
            case "retained" | "batched":
                return DoubleBackward(self._kept, batched=name == "batched")
            case "shared":
                return DoubleBackward(Graphs(*self._given, 0))
            case "checkpointed":
                split = split_to_fit(objective, source, params, self._budget)
                return DoubleBackward(Graphs(objective, split, params, 0))
            case "forward_over_reverse":
                return ForwardOverReverse(*self._given)
            case _ if self._slices is not None:
                return ShardedDifference(*self._given, self._slices)
            case _:
                return FiniteDifference(*self._given)
