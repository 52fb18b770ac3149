"""Finite differences: their estimated error, and restoring the model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.networks import OPERATORS, columns, dense, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator


def difference(model: nn.Module, data: Any, **options: Any) -> HessianOperator:
    return HessianOperator(
        model, nn.CrossEntropyLoss(), data, engine="finite_difference", **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_the_error_is_estimated(name: str, dtype: torch.dtype) -> None:
    model, x, target = make(name, dtype)
    op = difference(model, (x, target))
    assert op.error is None
    v = torch.randn(op.shape[0], dtype=dtype)
    result = op.matvec(v)
    exact = HessianOperator(model, nn.CrossEntropyLoss(), (x, target)).matvec(v)
    error = float((result - exact).norm() / exact.norm())
    assert op.error is not None
    assert error / 3 < op.error < 10 * error
    assert op.error < (1e-2 if dtype == torch.float32 else 1e-7)


def test_the_error_is_estimated_for_every_16th_product() -> None:
    model, x, target = make()
    calls = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(output, target)

    op = HessianOperator(model, loss_fn, (x, target), engine="finite_difference")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    spent = []
    for _ in range(34):
        calls = 0
        op.matvec(v)
        spent.append(calls)
    assert [i for i, count in enumerate(spent) if count > 2] == [0, 16, 32]
    assert max(spent) == 6  # the first also evaluates at x, and with parameters frozen


def test_null_vectors_do_not_warn() -> None:
    model, x, target = make("partial")
    op = difference(model, (x, target))
    V = torch.zeros(op.shape[0], 3, dtype=torch.float64)
    V[24:30, 0] = 1.0  # along the unused layer
    V[:24, 2] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = op.matmat(V)
    assert not result[:, :2].any()
    assert result[:, 2].any()


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("calls", [2, 3])
def test_the_model_is_restored(kind: type[CurvatureOperator], calls: int) -> None:
    """The parameters come back bit for bit, also after an interrupt on either side of x."""
    model, x, target = make("partial")
    state = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    calls_left = 1000

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls_left
        calls_left -= 1
        if not calls_left:
            raise KeyError("interrupted")
        return model(batch[0]), batch[1]

    op = kind(
        model, nn.CrossEntropyLoss(), (x, target), engine="finite_difference", forward=forward
    )
    other = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine="cached_graph")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    before = other.matvec(v)
    op.matvec(v)
    calls_left = calls - (kind is HessianOperator)
    with pytest.raises(KeyError, match="interrupted"):
        op.matvec(v)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(other.matvec(v), before)


def test_zero_and_scaled_vectors() -> None:
    model, x, target = make()
    op = difference(model, (x, target))
    v = torch.randn(39, dtype=torch.float64)
    assert not op.matvec(torch.zeros_like(v)).any()
    expected = dense(model, x, target) @ v
    for scale in (1e-6, 1.0, 1e6):
        torch.testing.assert_close(op.matvec(scale * v) / scale, expected, rtol=0, atol=1e-8)


def test_a_compiled_model() -> None:
    """It sees the perturbation; it has no second derivative, and an error says so."""
    model, x, target = make()
    expected = dense(model, x, target)
    compiled = torch.compile(model, backend="aot_eager")
    v = torch.ones(39, dtype=torch.float64)
    exact = HessianOperator(compiled, nn.CrossEntropyLoss(), (x, target), engine="cached_graph")
    with pytest.raises(RuntimeError, match="double backward") as raised:
        exact.matvec(v)
    assert "engine='finite_difference'" in raised.value.__notes__[0]
    result = columns(difference(compiled, (x, target)))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-8)
