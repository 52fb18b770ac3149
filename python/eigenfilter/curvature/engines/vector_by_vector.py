"""The base of engines that differentiate along one vector after the other and keep no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenfilter.curvature.engines.derivative_graphs import Pullback, check_recorded, noting_remedy
from eigenfilter.curvature.loss.batch_sources import BatchSource
from eigenfilter.curvature.loss.first_derivatives import Products
from eigenfilter.curvature.loss.objective import Evaluation, Objective
from eigenfilter.curvature.loss.vectors import Sums, split


@dataclass(frozen=True)
class WeightedBatch:
    """A batch with its weight and, unless the matrix is a Hessian, the pullback J^T phi''."""

    index: int
    data: Any
    weight: float
    pullback: Pullback | None = None


class VectorByVector:
    """Sums products over batches, vector by vector."""

    def __init__(
        self,
        objective: Objective,
        source: BatchSource,
        params: Sequence[Tensor],
        *,
        exact: bool,
    ) -> None:
        """Prepare; with `exact`, the first pass raises if a second derivative is not recorded."""
        self._objective = objective
        self._source = source
        self._params = params
        self._exact = exact
        self._padding = [
            (module, module.padding_idx, module.weight[module.padding_idx].detach().clone())
            for module in objective.tree.modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None
        ]
        self._weights: list[float] = []
        self._hessian = False

    def _sum(
        self, V: Tensor, product: Callable[[WeightedBatch, list[Tensor], int], Products]
    ) -> Sums:
        """Return sum_b w_b product_b for V [n, b].

        product: function (batch, vector in pieces, index of the vector) -> product in pieces.
        """
        sums = Sums(V, self._params)
        block = split(V.T, self._params)
        for index, data in enumerate(self._source.batches()):
            batch = self._weigh_batch(index, data)
            if batch.weight == 0:
                continue
            sums.weight += batch.weight
            for row in range(V.shape[1]):
                sums.add(product(batch, [piece[row] for piece in block], row), batch.weight, row)
            del batch  # with its graph, before the next one is built
        return sums

    @contextmanager
    def _constants(self) -> Iterator[None]:
        """Hold the embeddings of padding constant while the parameters change.

        The loss depends on them, but torch gives them no gradient.
        """

        def hook_for(index: int, row: Tensor) -> Callable[..., Tensor]:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                padding = torch.as_tensor(inputs[0] == index)
                return torch.where(padding.unsqueeze(-1), row, output)

            return hook

        hooks = [
            module.register_forward_hook(hook_for(index, row))
            for module, index, row in self._padding
        ]
        try:
            yield
        finally:
            for registered in hooks:
                registered.remove()

    def _first(self, index: int, batch: Any, here: Evaluation, *, leading: bool) -> None:
        """Check a batch that is met for the first time; leading: whether it is the first to count.

        A subclass may add checks of its own.
        """
        if leading and self._exact:
            check_recorded(here, self._params)

    def _weigh_batch(self, index: int, batch: Any) -> WeightedBatch:
        first = index == len(self._weights)
        if not first and (self._hessian or self._weights[index] == 0):
            return WeightedBatch(index, batch, self._weights[index])
        here = self._objective.evaluate(index, batch, exact=self._exact)
        self._hessian = here.outer is None
        if first:
            leading = not any(self._weights)
            self._weights.append(1.0 if self._source.single else here.weight())
            if self._weights[index]:
                self._first(index, batch, here, leading=leading)
        if self._hessian or self._weights[index] == 0:
            return WeightedBatch(index, batch, self._weights[index])
        with torch.enable_grad(), noting_remedy(), here.around():
            return WeightedBatch(index, batch, self._weights[index], Pullback(here, self._params))
