"""Embeddings by the function: padding as in torch's gradient, and no rows rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.networks import columns
from eigenfilter.curvature import HessianOperator

INDICES = torch.tensor([[0, 1, 1], [2, 3, 1], [4, 0, 2]])
TARGET = torch.tensor([0, 1, 1])


class Words(nn.Module):
    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.head = nn.Linear(3, 2, dtype=torch.float64)
        self.look_up = look_up

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.look_up(x, self.table).mean(1).tanh())  # type: ignore[no-any-return]


class Module(nn.Module):
    """The same model with torch's embedding module."""

    def __init__(self) -> None:
        super().__init__()
        same = Words(padded)
        self.words = nn.Embedding(5, 3, padding_idx=1, _weight=same.table.detach())
        self.head = same.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1).tanh())  # type: ignore[no-any-return]


def padded(x: Tensor, table: Tensor) -> Tensor:
    return F.embedding(x, table, padding_idx=1)


def operator(model: nn.Module, **options: Any) -> HessianOperator:
    return HessianOperator(model, F.cross_entropy, (INDICES, TARGET), **options)


@pytest.mark.parametrize("engine", ["auto", "cached_graph", "per_pass_graph", "microbatched"])
def test_padding_by_the_function_is_that_of_the_module(engine: str) -> None:
    own = columns(operator(Words(padded), engine=engine))
    torch.testing.assert_close(own, columns(operator(Module(), engine="per_pass_graph")))
    assert not own[3:6].any()


def by_weight_of_a_module(x: Tensor, words: nn.Embedding) -> Tensor:
    return F.embedding(x, words.weight, words.padding_idx)


def negative(x: Tensor, table: Tensor) -> Tensor:
    return F.embedding(x, table, padding_idx=-4)


@pytest.mark.parametrize("look_up", [padded, negative])
def test_finite_differences_hold_the_padding(look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
    product = columns(operator(Words(look_up), engine="finite_difference"))
    exact = columns(operator(Words(look_up), engine="per_pass_graph"))
    torch.testing.assert_close(product, exact, rtol=0, atol=1e-7)
    assert not product[3:6].any()


def test_finite_differences_hold_the_padding_of_a_module() -> None:
    module = operator(Module(), engine="finite_difference")
    exact = operator(Module(), engine="per_pass_graph")
    torch.testing.assert_close(columns(module), columns(exact), rtol=0, atol=1e-7)


def test_finite_differences_hold_the_padding_that_a_function_reads_of_a_module() -> None:
    """The module's own forward pass, and so its hooks, never run."""

    class Reads(Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(by_weight_of_a_module(x, self.words).mean(1).tanh())  # type: ignore[no-any-return]

    product, exact = (
        columns(operator(Reads(), engine=e)) for e in ("finite_difference", "per_pass_graph")
    )
    torch.testing.assert_close(product, exact, rtol=0, atol=1e-7)


def test_a_row_of_padding_that_is_read_otherwise_is_perturbed() -> None:
    """An output layer with the same weight reads it."""

    class Tied(Words):
        def forward(self, x: Tensor) -> Tensor:
            return padded(x, self.table).mean(1).tanh() @ self.table.T

    product, exact = (
        columns(operator(Tied(padded), engine=e)) for e in ("finite_difference", "per_pass_graph")
    )
    torch.testing.assert_close(product, exact, rtol=0, atol=1e-7)
    assert exact[3:6].any()


@pytest.mark.parametrize("engine", ["finite_difference", "per_pass_graph"])
def test_padding_does_not_matter_to_other_parameters(engine: str) -> None:
    model = Words(padded)
    op = operator(model, engine=engine, params=list(model.head.parameters()))
    whole = columns(operator(Words(padded), engine="per_pass_graph"))
    torch.testing.assert_close(columns(op), whole[15:, 15:], rtol=0, atol=1e-7)


def test_a_parametrized_module_holds_its_padding() -> None:
    def build() -> nn.Module:
        model = Module()
        torch.nn.utils.parametrizations.weight_norm(model.words)
        return model

    product, exact = (
        columns(operator(build(), engine=e)) for e in ("finite_difference", "per_pass_graph")
    )
    torch.testing.assert_close(product, exact, rtol=0, atol=1e-7)


def test_a_weight_that_is_computed_is_refused() -> None:
    model = Words(lambda x, table: padded(x, 2 * table))
    with pytest.raises(RuntimeError, match=r"use nn\.Embedding\(padding_idx=\.\.\.\), whose row"):
        operator(model, engine="finite_difference").matvec(torch.ones(23).double())


def renormalized(x: Tensor, table: Tensor) -> Tensor:
    return F.embedding(x, table, max_norm=0.5)


def bag(x: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(x, table, max_norm=0.5).unsqueeze(1)


def clamped(x: Tensor, table: Tensor) -> Tensor:
    with torch.no_grad():
        table.clamp_(-1.0, 1.0)
    return table[x]


@pytest.mark.parametrize("look_up", [renormalized, bag, clamped])
@pytest.mark.parametrize("engine", ["auto", "per_pass_graph", "finite_difference"])
def test_a_forward_pass_that_writes_to_parameters_raises(
    engine: str, look_up: Callable[[Tensor, Tensor], Tensor]
) -> None:
    with pytest.raises(RuntimeError, match=r"writes to the parameter .*table, which changes x"):
        operator(Words(look_up), engine=engine).matvec(torch.ones(23).double())
