"""Products by forward-mode differentiation of the first derivative."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from eigenfilter.curvature.data import Source
from eigenfilter.curvature.engines.directional import Directional, Place
from eigenfilter.curvature.engines.graphs import Products, explained
from eigenfilter.curvature.engines.vectors import Sums
from eigenfilter.curvature.objective import Objective


class ForwardOverReverse(Directional):
    """H v by the dual part of grad f(x + t v); J v by that of z(x + t v), then J^T phi''.

    No graph of a gradient is built, and nothing is kept between vectors.
    """

    def __init__(self, objective: Objective, source: Source, params: Sequence[Tensor]) -> None:
        super().__init__(objective, source, params, exact=True)
        with warnings.catch_warnings():  # torch imports this on the first use, and warns of itself
            warnings.simplefilter("ignore", FutureWarning)
            import_module("torch._decomp.decompositions_for_jvp")
        self._names = objective.names(params)
        self._x = tuple(p.detach() for p in params)

    def multiply(self, V: Tensor) -> Sums:
        """Return the products with V [n, b], summed over batches."""
        return self._sum(V, self._product)

    def _product(self, place: Place, v: list[Tensor], _: int) -> Products:
        def value(at: tuple[Tensor, ...]) -> Tensor:
            named = dict(zip(self._names, at, strict=True))
            return self._objective.evaluate(place.index, place.batch, named).value

        along = torch.func.grad(value) if place.pull is None else value
        with explained():
            found = torch.func.jvp(along, (self._x,), (tuple(v),))[1]
        return found if place.pull is None else place.pull(found)
