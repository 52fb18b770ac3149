"""The registry of engines, and their table in the documentation."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from curvature.networks import make
from eigenfilter.curvature import HessianOperator
from eigenfilter.curvature.engines import registry
from eigenfilter.curvature.engines.double_backward import DoubleBackward

DOCS = Path(__file__).parents[2] / "docs" / "curvature.md"


def test_the_documentation_has_the_table() -> None:
    """It is the output of `registry.table()`; paste it there when an engine changes."""
    assert registry.table() in DOCS.read_text()


@pytest.fixture
def registered() -> Iterator[list[int]]:
    """Register an engine "mine" for a test; yield the budgets that it is created with."""
    budgets = []

    @registry.register("mine", use="tests", cost="1 U")
    def mine(inputs: registry.EngineInputs) -> registry.Engine:
        budgets.append(inputs.budget)
        return DoubleBackward(inputs.graphs)

    yield budgets
    del registry.ENGINE_SPECS["mine"]


def test_an_engine_of_ones_own(registered: list[int]) -> None:
    """A registered engine can be requested by name."""
    model, x, target = make()
    v = torch.randn(39, dtype=torch.float64)
    data = x, target
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="mine", memory_budget=12345)
    expected = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="cached_graph")
    assert torch.equal(op.matvec(v), expected.matvec(v))
    assert registered == [12345]
