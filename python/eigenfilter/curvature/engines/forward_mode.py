"""Products by forward-mode differentiation of the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from eigenfilter.curvature.engines.registry import EngineInputs, register
from eigenfilter.curvature.engines.vector_by_vector import VectorByVector, WeightedBatch
from eigenfilter.curvature.loss.autograd_graph import reachable_leaves
from eigenfilter.curvature.loss.batch_sources import BatchSource, UnusableModelError
from eigenfilter.curvature.loss.batch_trees import leaves, replace_floating_tensors
from eigenfilter.curvature.loss.first_derivatives import Products, dense
from eigenfilter.curvature.loss.objective import Evaluation, Objective
from eigenfilter.curvature.loss.vectors import Sums

_NO_TANGENT = "ZeroTensors are immutable"  # torch's error where a constant needs a tangent
_WAYS_OUT = (
    "Forward-mode differentiation does not pass through the model or the loss. Double backward "
    "may: use engine='cached_graph', or 'auto'. If it does not either: use "
    "engine='finite_difference', which needs first derivatives only."
)


class ForwardOverReverse(VectorByVector):
    """H v as the tangent of grad f(x + t v); J v as that of z(x + t v), followed by J^T phi''.

    No graph of a gradient is built, and nothing is kept between vectors.

    Modules get dual tensors in place of their parameters. Whether f is still the same function is
    checked once for each batch: no parameter may come from elsewhere, and the value must be that of
    a plain evaluation (dropout draws another mask if forward mode gives a tensor another layout).
    """

    def __init__(self, objective: Objective, source: BatchSource, params: Sequence[Tensor]) -> None:
        super().__init__(objective, source, params, exact=True)
        with warnings.catch_warnings():  # torch imports this on first use, and its own code warns
            warnings.simplefilter("ignore", FutureWarning)
            import_module("torch._decomp.decompositions_for_jvp")
        self._names = objective.names(params)
        self._x = tuple(p.detach() for p in params)
        self._expected: dict[int, Tensor] = {}  # values of batches that are not checked yet
        self._explicit_tangents = False  # whether the data get explicit tangents of zero

    def multiply(self, V: Tensor) -> Sums:
        """Return the products with V [n, b], summed over batches."""
        return self._sum(V, self._product)

    def _first(self, index: int, batch: Any, here: Evaluation, *, leading: bool) -> None:
        super()._first(index, batch, here, leading=leading)
        self._expected[index] = here.value.detach()
        if leading:
            at = {n: x.clone().requires_grad_() for n, x in zip(self._names, self._x, strict=True)}
            with _noting_remedy(), self._constants():
                value = self._objective.evaluate(index, batch, at).value
            own = {id(p) for p in self._params}
            if any(id(t) in own for t in reachable_leaves([value])):
                raise RuntimeError(
                    "f uses a parameter that it does not take from its module, which forward mode "
                    "would miss: use engine='cached_graph', or read it from the module in each call"
                )

    def _product(self, batch: WeightedBatch, v: list[Tensor], _: int) -> Products:
        with _noting_remedy(), self._constants():
            try:
                value, derivative = self._along(batch, v)
            except RuntimeError as error:
                if self._explicit_tangents or _NO_TANGENT not in str(error):
                    raise
                self._explicit_tangents = True
                value, derivative = self._along(batch, v)
        self._check(batch.index, value)
        return dense(derivative) if batch.pullback is None else batch.pullback(derivative[0])

    def _along(self, batch: WeightedBatch, v: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return f, or z, and the derivative of grad f, or of z, along v."""
        data = list(leaves(batch.data)) if self._explicit_tangents else []
        data = [t.detach() for t in data if t.is_floating_point()]

        def value(at: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> Tensor:
            inputs = replace_floating_tensors(batch.data, tensors) if tensors else batch.data
            named = dict(zip(self._names, at, strict=True))
            return self._objective.evaluate(batch.index, inputs, named).value

        primals = self._x, tuple(data)
        tangents = tuple(v), tuple(map(torch.zeros_like, data))
        if batch.pullback is not None:
            result = torch.func.jvp(value, primals, tangents)  # z, its tangent
            return result[0], [result[1]]
        both = torch.func.grad_and_value(value)
        result = torch.func.jvp(both, primals, tangents)  # (gradient, f), their tangents
        return result[0][1], result[1][0]

    def _check(self, index: int, value: Tensor) -> None:
        expected = self._expected.pop(index, None)
        if expected is None:
            return
        eps = torch.finfo(self._objective.autocast or expected.dtype).eps
        if float((value - expected).abs().max()) > eps**0.5 * float(expected.abs().max()):
            raise RuntimeError(
                "under forward mode the model gives another value than without, as where dropout "
                "draws another mask: use engine='cached_graph', or mode='eval'"
            )


@contextmanager
def _noting_remedy() -> Iterator[None]:
    """Add to an error of torch a note that says what to do."""
    try:
        yield
    except UnusableModelError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        if not hasattr(error, "__notes__"):
            error.add_note(_WAYS_OUT)
        raise


@register("forward_over_reverse", use="memory is scarce", cost="1 to 2 U")
def _forward_over_reverse(inputs: EngineInputs) -> ForwardOverReverse:
    return ForwardOverReverse(*inputs.f)
