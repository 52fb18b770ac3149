"""Products by differences of the gradients that FSDP2 leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.curvature.engines.finite_difference import FiniteDifference
from eigenfilter.curvature.engines.registry import EngineInputs, register
from eigenfilter.curvature.engines.vector_by_vector import WeightedBatch
from eigenfilter.curvature.loss.batch_sources import BatchSource
from eigenfilter.curvature.loss.first_derivatives import Products, dense, unhooked
from eigenfilter.curvature.loss.objective import Evaluation, Objective
from eigenfilter.curvature.loss.slices import ShardSlices
from eigenfilter.curvature.loss.vectors import Sums, split
from eigenfilter.curvature.norms import norms


class ShardedDifference(FiniteDifference):
    """H v as `FiniteDifference`, of a model that FSDP2 shards, in slices.

    Each process moves its shards along its slice of v; FSDP2 gathers the parameters, and leaves in
    each process its shard of the mean of all processes' gradients. So every process takes part in
    every pass, and where its batches have come to an end repeats the last one with weight 0.
    Gradients that parameters held are put back.
    """

    def __init__(
        self,
        objective: Objective,
        source: BatchSource,
        params: Sequence[Tensor],
        slices: ShardSlices,
    ) -> None:
        self._slices = slices
        self._sharded = params
        self._holders = [p for p in objective.tree.parameters() if p.requires_grad]
        self._totals: list[float] = []  # of each batch's weights in all processes
        self._complete = False  # whether a pass has seen all batches
        super().__init__(objective, source, [_distributed.local(p) for p in params])

    def _sum(
        self, V: Tensor, product: Callable[[WeightedBatch, list[Tensor], int], Products]
    ) -> Sums:
        if not _distributed.averages(self._objective.tree):
            raise RuntimeError(
                "FSDP2 must leave mean gradients: set_requires_gradient_sync(True) and "
                "set_requires_all_reduce(True), and no set_gradient_divide_factor"
            )
        sums = Sums(V, self._params)
        block = split(V.T, self._params)
        for place in self._places():
            sums.weight += self._totals[place.index]
            for row in range(V.shape[1]):
                sums.add(product(place, [piece[row] for piece in block], row), 1.0, row)
        return sums

    def _places(self) -> Iterator[WeightedBatch]:
        """Yield this process's batches, and its last one again while others have more."""
        ended = object()
        batches = self._source.batches()
        known = len(self._totals) if self._complete else 0
        if not known:
            self._weights, self._totals = [], []
        batch, index, weighty = None, 0, None
        while True:
            following = next(batches, ended)
            if known and index == known:
                return
            more = following is not ended
            if not known and not self._slices.sum_of_all(more):
                self._complete = True
                return
            batch = following if more else batch
            if not known:
                self._note_weight(index, batch, more)
            weight = self._weights[index]
            if weight:
                weighty = batch
            # A pass with weight 0 must leave zeros: not of a batch whose loss may be no number.
            yield WeightedBatch(index, batch if weight or weighty is None else weighty, weight)
            index += 1

    def _note_weight(self, index: int, batch: object, more: bool) -> None:
        """Note what a batch weighs here, and in all processes; what one refuses, all do."""
        try:
            weight = self._weigh(index, batch)
        except ValueError:
            self._slices.sum_of_all(math.nan)
            raise
        self._weights.append(weight if more else 0.0)
        self._totals.append(self._slices.sum_of_all(self._weights[index]))
        if math.isnan(self._totals[index]):
            raise RuntimeError("another process refused its batches: its own error says why")

    def _weigh(self, index: int, batch: object) -> float:
        self._announce()
        return self._objective.evaluate(index, batch, exact=False).weight()

    def _gradient(self, place: WeightedBatch, here: Evaluation) -> Products:
        """Return the sum of all processes' weighted gradients: FSDP2 divides by their number."""
        held = [p.grad for p in self._holders]
        try:
            for p in self._holders:
                p.grad = None
            scale = torch.full_like(here.value, place.weight * self._slices.processes)
            with here.around(), unhooked(self._holders):
                torch.autograd.backward(here.value, scale)
            grads = [p.grad for p in self._sharded]
            return dense([None if g is None else _distributed.local(g) for g in grads])
        finally:
            for p, grad in zip(self._holders, held, strict=True):
                p.grad = grad

    def _announce(self) -> None:
        _distributed.reshard()

    def _norms(self, v: Tensor) -> Tensor:
        own = norms(v).double()
        size = self._slices.sum(own.clone())  # of all slices, for squares relative to it
        share = own / size.masked_fill(size == 0, 1.0)
        return (size * self._slices.sum(share.square()).sqrt()).to(v.dtype)


@register(
    "finite_difference",
    use="no second derivative: compiled models, reentrant checkpointing, FSDP2",
    cost="0.6 to 1 U, and an error",
)
def _finite_difference(inputs: EngineInputs) -> FiniteDifference:
    if inputs.slices is not None:
        return ShardedDifference(*inputs.f, inputs.slices)
    return FiniteDifference(*inputs.f)
