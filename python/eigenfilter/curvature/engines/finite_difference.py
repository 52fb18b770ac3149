"""Products by central differences of the first derivative, with an estimate of their error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eigenfilter.curvature.engines.derivative_graphs import gradient
from eigenfilter.curvature.engines.vector_by_vector import VectorByVector, WeightedBatch
from eigenfilter.curvature.loss.autograd_graph import nodes, nodes_below
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
        self._holds_padding = False  # whether a parameter is an embedding's weight with padding
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
            held = _HeldPadding(self._moving, backup) if self._holds_padding else nullcontext()
            with self._constants(), held:
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
        known = {id(p) for p in self._params}
        for node in nodes([here.value]):
            is_embedding = node.name().startswith("EmbeddingBackward")
            if not is_embedding or node._saved_padding_idx >= _NO_PADDING:
                continue
            weight = node.next_functions[0][0]
            if id(getattr(weight, "variable", None)) in known:
                self._holds_padding = True
            elif not self._padding and _leads_to(weight, known):
                raise UnusableModelError(
                    "F.embedding(padding_idx=...) gives no gradient to a row that the loss depends "
                    "on, and a finite difference would perturb it, for its weight is computed from "
                    "parameters: use nn.Embedding(padding_idx=...), whose row is held fixed, or an "
                    "exact engine"
                )

    def _announce(self) -> None:
        """Do what a subclass must do after parameters have changed."""

    def _norms(self, v: Tensor) -> Tensor:
        """Return the norms of v [n] or of the columns of v [n, b]."""
        return norms(v)


class _HeldPadding(TorchFunctionMode):
    """Where `F.embedding(padding_idx=...)` reads its row of padding as it is at x.

    torch gives that row no gradient, so it is a constant for a product. A row that is read
    otherwise, as by an output layer with the same weight, is perturbed like any other.
    """

    def __init__(self, params: Sequence[Tensor], backup: Sequence[Tensor]) -> None:
        super().__init__()
        self._at_x = {p.data_ptr(): old for p, old in zip(params, backup, strict=True)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.embedding:
            return output
        indices, weight, padding = _embedding_arguments(*args, **(kwargs or {}))
        at_x = self._at_x.get(weight.data_ptr())
        if padding is None or at_x is None or at_x.shape != weight.shape:
            return output
        is_padding = (indices == padding % len(weight)).unsqueeze(-1)
        return torch.where(is_padding, at_x[padding].to(output.dtype), output)


def _embedding_arguments(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, int | None]:
    return input, weight, padding_idx


def _leads_to(node: Any, ids: set[int]) -> bool:
    """Whether the graph below a node begins at a tensor of these ids."""
    return any(id(getattr(below, "variable", None)) in ids for below in nodes_below([node]))
