"""Products by central differences of the first derivative, with an estimate of their error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eigenfilter.curvature.engines.derivative_graphs import gradient
from eigenfilter.curvature.engines.vector_by_vector import VectorByVector, WeightedBatch
from eigenfilter.curvature.loss.autograd_graph import nodes
from eigenfilter.curvature.loss.batch_sources import BatchSource, UnusableModelError
from eigenfilter.curvature.loss.first_derivatives import Products
from eigenfilter.curvature.loss.objective import Evaluation, Objective
from eigenfilter.curvature.loss.vectors import Sums
from eigenfilter.curvature.norms import norms

_EVERY = 16  # products from one check of the error to the next
_PLAUSIBLE = 0.1
_NO_PADDING = 2**63


class FiniteDifference(VectorByVector):
    """H v = (g(x + h v) - g(x - h v)) / 2h, and J v from outputs z in the same way.

    The step is h = eps^(1/3) (1 + ||x||) / ||v||, with the eps of the coarsest dtype that takes
    part. It balances the rounding error, eps / h, and the error of the third derivative, h^2
    (J. Nocedal and S. Wright, Numerical Optimization, 2006, section 8.1). Parameters are perturbed
    in place, which compiled models see, and restored bit for bit.

    A second difference with the step 2h estimates the error: its rounding error is smaller, and the
    two differ by three times the error of the third derivative. Where gradients jump, at a ReLU or
    in max-pooling, the two do not agree at all. The first product at an x and every 16th is
    checked.

    Attributes:
        error: the largest estimate at this x, relative to the largest product of the block; None
            before the first.
    """

    def __init__(self, objective: Objective, source: BatchSource, params: Sequence[Tensor]) -> None:
        super().__init__(objective, source, params, exact=False)
        self.error: float | None = None
        self._moving = [p.data for p in params]
        self._since = _EVERY
        eps = torch.finfo(params[0].dtype).eps
        if objective.autocast is not None:
            eps = max(eps, torch.finfo(objective.autocast).eps)
        lengths = torch.stack([norms(p.reshape(-1)) for p in self._moving])
        self._step = eps ** (1 / 3) * (1 + float(self._norms(lengths)))

    def multiply(self, V: Tensor) -> Sums:
        """Return the products with V [n, b], summed over batches.

        Warns:
            RuntimeWarning: a product is off by more than a tenth.
        """
        lengths = self._norms(V)
        steps = (self._step / lengths.masked_fill(lengths == 0, 1.0)).tolist()
        sums = self._differences(V, steps)
        self._since += V.shape[1]
        if self._since > _EVERY:
            self._since = 1
            twice = self._differences(V[:, :1], [2 * steps[0]])
            self._judge(sums, twice, lengths)
        return sums

    def _judge(self, sums: Sums, twice: Sums, lengths: Tensor) -> None:
        # Relative to the largest product, since the error of a small one is as large.
        sizes = self._norms(sums.rows.T) / lengths
        off = self._norms(sums.rows[0] - twice.rows[0]) / lengths[0]
        error = float(off / sizes.nan_to_num(0.0).max())
        if not math.isfinite(error):  # all products are zero, or not finite, which solvers report
            return
        self.error = max(error, self.error or 0.0)
        if error > _PLAUSIBLE:
            warnings.warn(
                f"a finite difference is off by about {100 * error:.0f}%: the gradient is not "
                "smooth on the scale of the step (ReLU, max-pooling, low precision). Use an exact "
                "engine, or smooth operations",
                RuntimeWarning,
                stacklevel=7,
            )

    def _differences(self, V: Tensor, steps: Sequence[float]) -> Sums:
        def product(batch: WeightedBatch, v: list[Tensor], row: int) -> Products:
            h = steps[row]
            up, down = (self._at_perturbed(batch, v, t) for t in (h, -h))
            pairs = zip(up, down, strict=True)
            quotients = [None if a is None or b is None else (a - b) / (2 * h) for a, b in pairs]
            if batch.pullback is None:
                return quotients
            (along,) = quotients
            assert along is not None
            return batch.pullback(along)

        return self._sum(V, product)

    def _at_perturbed(self, batch: WeightedBatch, v: list[Tensor], t: float) -> Products:
        """Return the gradient, or z, at x + t v."""
        backup = [p.clone() for p in self._moving]
        try:
            torch._foreach_add_(self._moving, v, alpha=t)
            self._announce()
            with self._constants():
                if batch.pullback is not None:
                    return [self._objective.value(batch.index, batch.data, exact=False).value]
                here = self._objective.evaluate(batch.index, batch.data, exact=False)
                return self._gradient(batch, here)
        finally:
            torch._foreach_copy_(self._moving, backup)
            self._announce()

    def _gradient(self, batch: WeightedBatch, here: Evaluation) -> Products:
        return gradient(here, self._params)

    def _first(self, index: int, batch: Any, here: Evaluation, *, leading: bool) -> None:
        super()._first(index, batch, here, leading=leading)
        modules = [m for m in self._objective.tree.modules() if isinstance(m, nn.Embedding)]
        module_padding = {(id(m.weight), m.padding_idx) for m in modules}
        for node in nodes([here.value]):
            if not node.name().startswith("EmbeddingBackward"):
                continue
            weight = getattr(node.next_functions[0][0], "variable", None)
            index = node._saved_padding_idx  # of none the largest of its type
            if index < _NO_PADDING and (id(weight), index) not in module_padding:
                raise UnusableModelError(
                    "F.embedding(padding_idx=...) gives no gradient to a row that the loss depends "
                    "on, and a finite difference would perturb it: use "
                    "nn.Embedding(padding_idx=...), whose row is held fixed, or an exact engine"
                )

    def _announce(self) -> None:
        """Do what a subclass must do after parameters have changed."""

    def _norms(self, v: Tensor) -> Tensor:
        """Return the norms of v [n] or of the columns of v [n, b]."""
        return norms(v)
