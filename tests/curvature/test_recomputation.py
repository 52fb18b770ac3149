"""Models that run their forward pass again in backward are differentiated as evaluated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvature.networks import OPERATORS, columns, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator
from eigenfilter.curvature.engines.memory import graph_bytes
from marks import rest_slow

ENGINES = ["cached_graph", "per_pass_graph", "vmap", "finite_difference", "auto"]


class Recomputing(nn.Module):
    """A network whose backward repeats its forward pass; counts forward passes."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._count, x, use_reentrant=False)

    def _count(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.inside(x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", rest_slow(OPERATORS))
def test_products(kind: type[CurvatureOperator], mode: str, engine: str) -> None:
    """The model is in the other mode; dropout and batch normalization distinguish the two."""
    model, x, target = make("partial")
    expected = OPERATORS[kind](model, x, target, mode=mode)
    if mode == "train" and engine == "vmap":
        pytest.skip("drawing masks again is refused under vmap")
    model = Recomputing(model).train(mode == "eval")
    state = copy.deepcopy(model.state_dict())
    op = kind(model, nn.CrossEntropyLoss(), (x, target), mode=mode, engine=engine)
    before = torch.get_rng_state()
    atol = 1e-7 if engine == "finite_difference" else 1e-12
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=atol)
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=atol)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training is (mode == "eval") for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_measuring_a_graph_runs_nothing_again() -> None:
    inside, x, _ = make()
    model = Recomputing(inside)
    total = model(x).square().sum()
    assert graph_bytes([total], list(model.parameters())) > 0
    assert model.passes == 1


@pytest.mark.parametrize("engine", ["vmap", "forward_over_reverse"])
def test_functorch_errors_carry_a_remedy(engine: str) -> None:
    inside, x, target = make("partial")
    data, loss = (x, target), nn.CrossEntropyLoss()
    op = HessianOperator(Recomputing(inside), loss, data, mode="train", engine=engine)
    with pytest.raises(RuntimeError) as raised:
        columns(op)
    assert "engine='cached_graph'" in raised.value.__notes__[0]
