"""Losses without a second derivative, missing or zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.networks import OPERATORS, columns, dense, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator, eigsh
from eigenfilter.curvature.engines import NAMES

EXACT = [name for name in NAMES if name != "finite_difference"]


class Square(torch.autograd.Function):
    """x^2, with a backward that autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 * x * grad).detach()


class MarkedSquare(Square):
    """The same, marked `once_differentiable`."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Square.backward(ctx, grad)


class DualSquare(torch.autograd.Function):
    """The same, with a forward derivative, so that forward mode passes through it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * tangent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Square.backward(ctx, grad)


@pytest.mark.parametrize("square", [Square, MarkedSquare])
@pytest.mark.parametrize("where", ["first", "middle", "branch", "last"])
def test_a_missing_second_derivative_is_named(square: type[Square], where: str) -> None:
    """Torch does not raise for these: the operation's contribution would be missing."""

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            if where == "branch":
                return self.outer(torch.tanh(x) + square.apply(x))
            x = square.apply(x) if where == "middle" else torch.tanh(x)
            return self.outer(x)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if where == "first":
            return square.apply(output.mean() + model.inner.bias.sum())
        return (square.apply(output) if where == "last" else output).pow(2).mean()

    model = Bent().double()
    op = HessianOperator(model, loss_fn, (make()[1], None), engine="cached_graph")
    with pytest.raises(RuntimeError, match="has no second derivative"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("square", [Square, MarkedSquare, DualSquare])
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("kind", OPERATORS)
def test_every_exact_engine_refuses_and_differences_work(
    kind: type[CurvatureOperator], engine: str, square: type[Square]
) -> None:
    class Bent(nn.Module):
        def __init__(self, square: Any) -> None:
            super().__init__()
            self.inner, self.outer, self.square = nn.Linear(5, 4), nn.Linear(4, 3), square

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.square(self.inner(x)))

    model, (_, x, target) = Bent(square.apply).double(), make()
    v = torch.randn(39, dtype=torch.float64)
    op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    with pytest.raises(RuntimeError) as raised:
        op.matvec(v)
    assert "engine='finite_difference'" in " ".join([str(raised.value), *_notes(raised.value)])
    model.square = torch.square
    expected = OPERATORS[kind](model, x, target) @ v
    model.square = square.apply
    for taken in ("finite_difference", "auto"):
        op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=taken)
        torch.testing.assert_close(op.matvec(v), expected, rtol=0, atol=1e-8)
        assert op.engine == "finite_difference"


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def test_a_missing_forward_derivative_is_named() -> None:
    """Distances have a second derivative only by double backward."""
    model, x, target = make()
    centers = torch.randn(3, 3, dtype=torch.float64)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return torch.cdist(output, centers, p=3.0).square().mean()

    def written_out(output: Tensor, target: Tensor) -> Tensor:
        return (output[:, None] - centers).abs().pow(3).sum(2).pow(2 / 3).mean()

    v = torch.randn(39, dtype=torch.float64)
    op = HessianOperator(model, loss_fn, (x, target), engine="forward_over_reverse")
    with pytest.raises(NotImplementedError, match="cdist") as raised:
        op.matvec(v)
    assert "use engine='cached_graph'" in raised.value.__notes__[0]
    result = HessianOperator(model, loss_fn, (x, target), engine="cached_graph").matvec(v)
    expected = dense(model, x, target, loss_fn=written_out) @ v
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_a_loss_without_a_graph_raises() -> None:
    model, x, target = make()
    op = HessianOperator(model, lambda output, target: output.detach().square().mean(), (x, target))
    with pytest.raises(RuntimeError, match="loss does not depend on the parameters"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("dependence", ["linearly", "through sign", "not at all"])
def test_a_linear_loss_has_no_curvature(dependence: str) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.3, -2.0], dtype=torch.float64))
            self.other = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            if dependence == "not at all":
                return self.other.square()
            weight = torch.sign(self.weight) if dependence == "through sign" else self.weight
            return (x * weight).sum() + self.other

    model = Flat()
    data = (torch.ones(2, dtype=torch.float64), None)
    op = HessianOperator(
        model, lambda output, target: output, data, params=[model.weight], reduction="sum"
    )
    assert torch.equal(columns(op), torch.zeros(2, 2, dtype=torch.float64))
    assert eigsh(op, 2, "LM").values.tolist() == [0.0, 0.0]


def test_a_parameter_used_linearly_has_zero_rows() -> None:
    def mean(output: Tensor, target: Tensor) -> Tensor:
        return output.mean()

    model, x, target = make()
    op = HessianOperator(model, mean, (x, target))
    result = columns(op)
    expected = dense(model, x, target, loss_fn=mean)
    assert not result[-3:].any()
    assert result.abs().max() > 1e-2
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)
