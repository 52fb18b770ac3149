"""Products by differences of gradients, for models that FSDP2 shards."""

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
from eigenfilter.curvature.loss.first_derivatives import Products, dense, without_hooks
from eigenfilter.curvature.loss.objective import Evaluation, Objective
from eigenfilter.curvature.loss.slices import ShardSlices
from eigenfilter.curvature.loss.vectors import Sums, split
from eigenfilter.curvature.norms import norms


class ShardedDifference(FiniteDifference):
    """H v as in `FiniteDifference`, in slices, for a model that FSDP2 shards.

    Each process perturbs its shards along its slice of v. FSDP2 gathers the parameters, and leaves
    in each process its shard of the mean of all processes' gradients. So every process takes part
    in every pass; after the end of its batches it repeats the last one with weight 0. `.grad` of
    the parameters is restored.
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
        self._totals: list[float] = []  # the sum of each batch's weights over all processes
        self._complete = False  # whether a pass has read all batches
        super().__init__(objective, source, [_distributed.local(p) for p in params])

    def _sum(
        self, V: Tensor, product: Callable[[WeightedBatch, list[Tensor], int], Products]
    ) -> Sums:
        if not _distributed.averages(self._objective.tree):
            raise RuntimeError(
                "FSDP2 must leave mean gradients: set_requires_gradient_sync(True) and "
                "set_requires_all_reduce(True), no set_gradient_divide_factor, and "
                "ascent_sync(model, opt, enabled=True)"
            )
        sums = Sums(V, self._params)
        block = split(V.T, self._params)
        for batch in self._weighted_batches():
            sums.weight += self._totals[batch.index]
            for row in range(V.shape[1]):
                sums.add(product(batch, [piece[row] for piece in block], row), 1.0, row)
        return sums

    def _weighted_batches(self) -> Iterator[WeightedBatch]:
        """Yield this process's batches, then its last one while other processes have more."""
        end = object()
        batches = self._source.batches()
        count = len(self._totals) if self._complete else 0
        if not count:
            self._weights, self._totals = [], []
        batch, index, with_weight = None, 0, None
        while True:
            following = next(batches, end)
            if count and index == count:
                return
            more = following is not end
            if not count and not self._slices.sum_of_all(more):
                self._complete = True
                return
            batch = following if more else batch
            if not count:
                self._record_weight(index, batch, more)
            weight = self._weights[index]
            if weight:
                with_weight = batch
            # A pass with weight 0 must contribute zeros, but the loss on a batch of weight 0 may be
            # NaN. So it takes a batch that had a weight.
            data = batch if weight or with_weight is None else with_weight
            yield WeightedBatch(index, data, weight)
            index += 1

    def _record_weight(self, index: int, batch: object, more: bool) -> None:
        """Record a batch's weight here and in all processes; if one raises, all do."""
        try:
            weight = self._weigh(index, batch)
        except ValueError:
            self._slices.sum_of_all(math.nan)
            raise
        self._weights.append(weight if more else 0.0)
        self._totals.append(self._slices.sum_of_all(self._weights[index]))
        if math.isnan(self._totals[index]):
            raise RuntimeError("another process raised an error about its batches: see that error")

    def _weigh(self, index: int, batch: object) -> float:
        self._announce()
        return self._objective.evaluate(index, batch, exact=False).weight()

    def _gradient(self, batch: WeightedBatch, here: Evaluation) -> Products:
        """Return the sum of all processes' weighted gradients; FSDP2 divides by their number."""
        before = [p.grad for p in self._holders]
        try:
            for p in self._holders:
                p.grad = None
            scale = torch.full_like(here.value, batch.weight * self._slices.processes)
            with here.around(), without_hooks(self._holders):
                torch.autograd.backward(here.value, scale)
            grads = [p.grad for p in self._sharded]
            return dense([None if g is None else _distributed.local(g) for g in grads])
        finally:
            for p, grad in zip(self._holders, before, strict=True):
                p.grad = grad

    def _announce(self) -> None:
        _distributed.reshard()

    def _norms(self, v: Tensor) -> Tensor:
        own = norms(v).double()
        size = self._slices.sum(own.clone())  # a scale over all slices, so that squares are normal
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
