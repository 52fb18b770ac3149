"""Operators in matrix notation, and in another dtype than their model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.networks import OPERATORS, columns, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator, eigsh
from eigenfilter.curvature.engines import NAMES
from eigenfilter.curvature.operators import algebra
from marks import rest_slow


@pytest.mark.parametrize("engine", ["auto", "cached_graph", "finite_difference"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_matrix_notation(kind: type[CurvatureOperator], engine: str) -> None:
    model, x, target = make()
    expected = OPERATORS[kind](model, x, target)
    op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    v, V = torch.randn(39, dtype=torch.float64), torch.randn(39, 3, dtype=torch.float64)

    def assert_agrees(result: Tensor, right: Tensor) -> None:
        torch.testing.assert_close(result, right, rtol=0, atol=1e-6)

    assert_agrees(op @ v, expected @ v)
    assert_agrees(v @ op, v @ expected)
    assert_agrees(op @ V, expected @ V)
    assert_agrees(V.T @ op, V.T @ expected)
    assert_agrees(V.T @ (op @ V), V.T @ expected @ V)
    assert_agrees(V.T @ op.T @ V, V.T @ expected @ V)
    assert op.T is op
    dense = op.to_dense()
    assert_agrees(dense, expected)
    assert torch.equal(dense, dense.T)


def test_other_arrays_raise_with_a_remedy() -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    v = torch.ones(39, dtype=torch.float64).numpy()
    for product in (lambda: op @ v, lambda: v @ op, lambda: op @ [1.0]):
        with pytest.raises(TypeError, match=r"torch\.as_tensor\(v, dtype=op\.dtype"):
            product()
    with pytest.raises(ValueError, match="v must be"):
        op @ torch.ones(38, dtype=torch.float64)
    with pytest.raises(ValueError, match="V must be"):
        torch.ones(2, 38, dtype=torch.float64) @ op


def test_a_matrix_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    monkeypatch.setattr(algebra, "default_budget", lambda device: 39 * 39 * 8 - 1)
    with pytest.raises(ValueError, match=r"of 39 parameters takes.*free on cpu: use products"):
        op.to_dense()
    monkeypatch.setattr(algebra, "default_budget", lambda device: 39 * 39 * 8)
    assert op.to_dense().shape == (39, 39)


def test_a_model_that_changes_between_columns() -> None:
    model, x, target = make()
    changes = False

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if changes:
            with torch.no_grad():
                model.get_parameter("0.bias").add_(1)
        return nn.functional.cross_entropy(output, target)

    op = HessianOperator(model, loss_fn, (x, target), engine="per_pass_graph")
    op.matvec(torch.ones(op.shape[0], dtype=op.dtype))
    changes = True
    with pytest.raises(RuntimeError, match="changed while a solver"):
        op.to_dense()


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("mlp", torch.bfloat16),
        ("mlp", torch.float16),
        ("conv_norm", torch.bfloat16),
        ("partial", torch.float16),
        ("conv", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("engine", rest_slow([*NAMES, "auto"], "auto", "cached_graph"))
def test_a_model_in_half_precision(engine: str, half: torch.dtype, name: str) -> None:
    """Check against a float32 or float64 model with the same parameters and data."""
    model, x, target = make(name, torch.float32)
    model.to(half)
    data = (x.to(half) if x.is_floating_point() else x, target)
    state = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model).double()
    wide = data[0].double() if x.is_floating_point() else x
    for kind in OPERATORS:
        if kind is not HessianOperator and name != "mlp":
            continue
        expected = OPERATORS[kind](twin, wide, target)
        for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
            op = kind(model, nn.CrossEntropyLoss(), data, engine=engine, dtype=dtype)
            if engine == "finite_difference":
                rtol = 0.05 if dtype == torch.float32 else 1e-6
            result = columns(op)
            assert op.dtype == result.dtype == dtype
            scale = float(expected.abs().max())
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=rtol * scale)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(value.dtype == state[key].dtype for key, value in model.state_dict().items())


def test_the_copy_follows_the_model_and_solvers_take_it() -> None:
    model, x, target = make(dtype=torch.bfloat16)
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), dtype=torch.float64)
    twin = copy.deepcopy(model).double()
    for _ in range(2):
        wide = HessianOperator(twin, nn.CrossEntropyLoss(), (x.double(), target))
        expected = torch.linalg.eigvalsh(wide.to_dense())
        torch.testing.assert_close(op.to_dense(), wide.to_dense(), rtol=0, atol=1e-13)
        torch.testing.assert_close(op.gradient(), wide.gradient(), rtol=0, atol=1e-13)
        top = eigsh(op, 2).values
        torch.testing.assert_close(top, expected.flip(0)[:2], rtol=1e-4, atol=1e-8)
        with torch.no_grad():
            model.get_parameter("0.weight").mul_(2)
            twin.get_parameter("0.weight").mul_(2)
    assert all(p is q for p, q in zip(op.params, model.parameters(), strict=True))
    some = HessianOperator(
        model,
        nn.CrossEntropyLoss(),
        (x, target),
        dtype=torch.float64,
        params=[model.get_parameter("3.weight")],
    )
    block = op.to_dense()[-15:-3, -15:-3]
    torch.testing.assert_close(some.to_dense(), block, rtol=0, atol=1e-13)


def test_mixed_dtypes_and_other_layouts() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3).double())

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.body:
                x = layer(x.to(layer.weight.dtype) if isinstance(layer, nn.Linear) else x)
            return x

    _, x, target = make()
    network = Cast()

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch["x"]), batch["y"]

    data = {"x": x.float(), "y": target}
    op = HessianOperator(network, nn.CrossEntropyLoss(), data, forward=forward, dtype=torch.float64)
    twin = copy.deepcopy(network).double()
    expected = OPERATORS[HessianOperator](twin, x.float().double(), target)
    torch.testing.assert_close(op.to_dense(), expected, rtol=0, atol=1e-12)


def test_a_loss_that_holds_the_model_itself_raises() -> None:
    """The copy is differentiated, and the loss refers to the original."""
    model, x, target = make(dtype=torch.bfloat16)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target) + model[0].weight.square().sum()

    op = HessianOperator(model, loss_fn, (x, target), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="uses a parameter of the model itself"):
        op.matvec(torch.ones(39))

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["model"] = model

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            decay = self.model[0].weight.square().sum()
            return nn.functional.cross_entropy(output, target) + decay

    plain = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), dtype=torch.float64)
    op = HessianOperator(model, Decay(), (x, target), dtype=torch.float64)
    expected = plain.to_dense()
    expected[:20, :20] += 2 * torch.eye(20)
    torch.testing.assert_close(op.to_dense(), expected, rtol=0, atol=1e-12)


def half_precision_cases() -> list[tuple[dict[str, Any], str]]:
    complex_ = nn.Linear(5, 3, dtype=torch.complex64)
    return [
        ({}, r"too coarse.*dtype=torch\.float32"),
        ({"dtype": torch.bfloat16}, r"dtype must be torch\.float32 or torch\.float64"),
        ({"dtype": torch.complex64}, r"dtype must be torch\.float32 or torch\.float64"),
        ({"model": complex_, "dtype": torch.float32}, "real and floating"),
    ]


@pytest.mark.parametrize(("changed", "message"), half_precision_cases())
def test_half_precision_raises_with_a_remedy(changed: dict[str, Any], message: str) -> None:
    model, x, target = make(dtype=torch.bfloat16)
    arguments = {"model": model, "loss_fn": nn.CrossEntropyLoss(), "data": (x, target), **changed}
    with pytest.raises(ValueError, match=message):
        HessianOperator(**arguments)
