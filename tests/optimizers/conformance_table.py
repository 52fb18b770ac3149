"""The table of optimizers that the conformance tests run over, and how they train them.

A row of the table is an optimizer with one way to ascend. Problems are those of `problems.py`, in
float64 unless a test asks for another dtype. "torch Muon" accepts matrices only: its problem has
no other parameters, and tests about parameters of other shapes run over `ANY_SHAPE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from optimizers.problems import METHODS, SHAPES, closure_of, parameters

MATRICES = ((4, 5), (3, 2), (1, 7), (6, 4))

SGD = {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.03}
ADAMW = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.03}
MUON = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.03}

Make = Callable[..., Any]
"""Makes an optimizer from parameters or groups; keyword arguments change its hyperparameters."""


@dataclass(frozen=True)
class Row:
    """An optimizer of the table.

    Attributes:
        make: makes the optimizer.
        make_plain: makes the optimizer without an ascent that it equals at rho = 0, bit for bit.
        make_torch: makes the optimizer of torch that its state can be loaded into.
        calls: how many gradients a step takes.
        rho: the radius of its ascent.
        finite_difference: whether it takes finite differences of gradients.
        shapes: the shapes of its parameters.
    """

    make: Make
    make_plain: Make
    make_torch: Make
    calls: int
    rho: float = 0.0
    finite_difference: bool = False
    shapes: Sequence[tuple[int, ...]] = SHAPES

    def parameters(self, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
        return parameters(dtype, self.shapes)

    @property
    def rounding(self) -> float:
        """Largest distance of two short runs in float64 that differ by the order of sums."""
        return 1e-7 if self.finite_difference else 1e-14


def with_settings(make: Make, settings: Mapping[str, Any]) -> Make:
    return lambda params, **changes: make(params, **{**settings, **changes})


def ignoring_rho(make: Make) -> Make:
    """Optimizers that take no ascent have no argument rho, and the tests may pass one to all."""
    return lambda params, rho=0.0, **changes: make(params, **changes)


def row(make: Make, make_plain: Make, make_torch: Make, method: str = "", **fields: Any) -> Row:
    if not method:
        return Row(make, make_plain, make_torch, 1, **fields)
    m = METHODS[method]
    return Row(
        make,
        make_plain,
        make_torch,
        calls=m.calls,
        rho=m.rho,
        finite_difference=method == "difference",
        **fields,
    )


def with_sgd(method: str = "") -> Row:
    make_plain = ignoring_rho(with_settings(ef.SGD, SGD))
    make = with_settings(METHODS[method].make, SGD) if method else make_plain
    return row(make, make_plain, with_settings(torch.optim.SGD, SGD), method)


def with_adamw(method: str = "") -> Row:
    make_plain = ignoring_rho(with_settings(ef.AdamW, ADAMW))
    make_torch = with_settings(torch.optim.AdamW, ADAMW)
    if not method:
        return row(make_plain, make_plain, make_torch)
    m = METHODS[method]
    options = {"method": m.name, "rho": m.rho, **m.options}
    return row(with_settings(ef.AdamW, ADAMW | options), make_plain, make_torch, method)


def wrapped(base: Make, settings: Mapping[str, Any], method: str, **fields: Any) -> Row:
    m = METHODS[method]
    make_torch = with_settings(base, settings)

    def make(
        params: Any, *, rho: float = m.rho, skip_nonfinite: bool = False, **changes: Any
    ) -> ef.SharpnessAware:
        inner = make_torch(params, **changes)
        return ef.SharpnessAware(inner, m.name, rho, skip_nonfinite=skip_nonfinite, **m.options)

    return row(make, make_torch, make_torch, method, **fields)


OPTIMIZERS = {
    "SGD": with_sgd(),
    **{f"SGD {method}": with_sgd(method) for method in METHODS},
    "AdamW": with_adamw(),
    **{f"AdamW {method}": with_adamw(method) for method in METHODS},
    "torch SGD": wrapped(torch.optim.SGD, SGD, "asam"),
    "torch AdamW": wrapped(torch.optim.AdamW, ADAMW | {"foreach": False}, "anchored"),
    "torch fused AdamW": wrapped(torch.optim.AdamW, ADAMW | {"fused": True}, "difference"),
    "torch fused SGD": wrapped(torch.optim.SGD, SGD | {"fused": True}, "product"),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["torch Muon"] = wrapped(torch.optim.Muon, MUON, "sam", shapes=MATRICES)

ANY_SHAPE = {name: row for name, row in OPTIMIZERS.items() if row.shapes is SHAPES}
ASCENDING = {name: row for name, row in OPTIMIZERS.items() if row.calls > 1}


def each(rows: Mapping[str, Row]) -> pytest.MarkDecorator:
    """Run a test for each of these rows."""
    return pytest.mark.parametrize("row", rows.values(), ids=rows)


# Run a test for each call of the closure in a step of each optimizer.
each_call = pytest.mark.parametrize(
    ("row", "failing"),
    [
        pytest.param(r, i, id=f"{name}-{i}")
        for name, r in OPTIMIZERS.items()
        for i in range(r.calls)
    ],
)


def train(opt: Any, params: Sequence[Tensor], steps: int = 3, **problem: Any) -> None:
    closure = closure_of(opt, params, **problem)
    for _ in range(steps):
        opt.step(closure)


def clones(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]
