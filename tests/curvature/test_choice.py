"""The choice of engine="auto", and the estimated memory of graphs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature.networks import OPERATORS, columns, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator
from eigenfilter.curvature.engines import choice
from eigenfilter.curvature.engines.memory import default_budget, graph_bytes

LOGGER = "eigenfilter.curvature.engines.choice"


def pretend(monkeypatch: pytest.MonkeyPatch, times: list[float]) -> None:
    """Make the trials take these seconds: one vector, build, batched, forward."""
    durations = iter(times)

    def seconds(run: Callable[[], object], device: torch.device) -> float:
        run()
        return next(durations)

    monkeypatch.setattr(choice, "_seconds", seconds)


@pytest.mark.parametrize(
    ("times", "expected"),
    [([1e-3, 2e-3], "vmap"), ([1e-3, 3.9e-3], "cached_graph"), ([0.2], "cached_graph")],
)
def test_blocks_are_vectorized_where_that_is_faster(
    times: list[float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    pretend(monkeypatch, times)
    V = torch.randn(39, 4, dtype=torch.float64)
    op.matmat(V)
    assert op.engine == expected
    pretend(monkeypatch, [1e-3])
    op.matvec(V[:, 0])
    assert op.engine == "cached_graph"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([1e-3, 1e-3, 1e-3], "forward_over_reverse"),
        ([1e-3, 1e-3, 1.9e-3], "cached_graph"),
    ],
)
def test_graphs_that_cannot_all_be_kept(
    times: list[float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, target = make()
    data = DataLoader(TensorDataset(x, target), batch_size=8)
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, memory_budget=7_000)
    pretend(monkeypatch, times)
    op.matvec(torch.ones(39, dtype=torch.float64))
    assert op.engine == expected


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_graph_beyond_the_budget_is_never_built(
    kind: type[CurvatureOperator], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, target = make()
    arguments = {"model": model, "loss_fn": nn.CrossEntropyLoss(), "data": (x, target)}
    v = torch.ones(39, dtype=torch.float64)
    expected = kind(**arguments).matvec(v)
    split = kind(**arguments, memory_budget=9_000)
    torch.testing.assert_close(split.matvec(v), expected, rtol=0, atol=1e-13)
    assert split.engine == "microbatched"
    coupled = kind(**arguments, memory_budget=9_000, mode="train")
    assert coupled.matvec(v).abs().max() > 1e-3
    assert coupled.engine == "forward_over_reverse"


def test_the_choice_is_made_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x, target = make("partial")
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    assert op.engine == "auto"
    with caplog.at_level(logging.INFO, LOGGER):
        for _ in range(2):
            columns(op)
            op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
            with torch.no_grad():
                model.get_parameter("last.weight").mul_(2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"products with {op.shape[0]} vectors: engine ")
    assert second.startswith("products with 1 vectors: engine 'cached_graph' (its graphs")


def test_models_that_vmap_does_not_support_use_another_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its backward reads values, which a vectorized one does not have."""

    class Choosing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.tanh(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            sign = 1.0 if grad.sum().item() > -1e9 else -1.0
            return sign * grad * (1 - torch.tanh(x).square())

    model, x, target = make()
    op = HessianOperator(
        model, lambda z, t: nn.functional.cross_entropy(Choosing.apply(z), t), (x, target)
    )
    with caplog.at_level(logging.INFO, LOGGER):
        result = columns(op)
    assert op.engine == "cached_graph"
    with_vmap = HessianOperator(
        model,
        lambda z, t: nn.functional.cross_entropy(Choosing.apply(z), t),
        (x, target),
        engine="vmap",
    )
    with pytest.raises(RuntimeError, match="Batching rule not implemented") as raised:
        columns(with_vmap)
    assert "engine='cached_graph'" in raised.value.__notes__[0]
    (record,) = caplog.records
    assert "vmap refused: " in record.getMessage()
    smooth = HessianOperator(
        model, lambda z, t: nn.functional.cross_entropy(torch.tanh(z), t), (x, target)
    )
    torch.testing.assert_close(result, columns(smooth), rtol=0, atol=1e-13)


def test_the_warnings_of_a_model_are_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They exclude no engine, and reach the caller."""

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        warnings.warn("the loss is deprecated", UserWarning, stacklevel=1)
        return nn.functional.cross_entropy(output, target)

    model, x, target = make()
    data = DataLoader(TensorDataset(x, target), batch_size=8)
    op = HessianOperator(model, loss_fn, data, memory_budget=7_000)
    pretend(monkeypatch, [1e-3, 1e-3, 1e-3])
    with caplog.at_level(logging.INFO, LOGGER), pytest.warns(UserWarning, match="deprecated"):
        op.matvec(torch.ones(39, dtype=torch.float64))
    assert op.engine == "forward_over_reverse"
    assert "refused" not in caplog.text


def test_the_bytes_of_a_graph() -> None:
    """The tensors that operations saved, each storage once, without weights and data."""
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(50, 10)
    hidden = torch.tanh(x @ weight)
    loss = hidden.square().sum()
    each = 50 * 10 * 4
    assert graph_bytes([loss], [weight, x]) == each + loss.nbytes
    assert graph_bytes([loss, hidden], [weight]) == 2 * each + loss.nbytes
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    # tanh's result and the gradient that reaches it; two seeds; the gradient of the weight.
    second = graph_bytes([loss, grad], [weight, x])
    assert second == 2 * each + 2 * loss.nbytes + grad.nbytes


def test_half_of_what_is_free() -> None:
    assert 2**20 < default_budget(torch.device("cpu")) < 2**46
