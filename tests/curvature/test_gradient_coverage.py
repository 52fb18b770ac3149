"""Gradients that are sparse, that come by backward() alone, or that are missing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from curvature.networks import OPERATORS, columns, dense, make
from eigenfilter.curvature import CurvatureOperator, GGNOperator, HessianOperator
from eigenfilter.curvature.engines import NAMES


class Words(nn.Module):
    """Embeddings by modules or by torch's function, possibly with sparse gradients."""

    def __init__(self, sparse: bool, functional: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3, sparse=sparse, padding_idx=2)
        self.linear = nn.Linear(3, 3)
        self.functional = functional

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.words.weight
        x = F.embedding(ids, weight, sparse=True) if self.functional else self.words(ids)
        return self.linear(torch.tanh(x.mean(1)))


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("kind", OPERATORS)
def test_sparse_gradients(kind: type[CurvatureOperator], functional: bool, engine: str) -> None:
    model = Words(True, functional).double()
    ids, target = torch.randint(6, (20, 4)), torch.randint(3, (20,))
    twin = Words(False).double()
    twin.load_state_dict(model.state_dict())
    if functional:
        twin.words.padding_idx = None
    expected = OPERATORS[kind](twin, ids, target)
    op = kind(model, nn.CrossEntropyLoss(), (ids, target), engine=engine)
    try:
        result = columns(op)
    except RuntimeError as error:
        able = engine not in ("vmap", "forward_over_reverse") or not functional
        if able or "engine='cached_graph'" not in error.__notes__[0]:
            raise
        return
    atol = 1e-7 if engine == "finite_difference" else 1e-12
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)
    assert not result.is_sparse
    assert model.words.sparse


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_padding_is_constant_whatever_the_engine(
    kind: type[CurvatureOperator], engine: str
) -> None:
    """The loss depends on the padding row, which gets a gradient only through the head."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3, padding_idx=1)
            with torch.no_grad():
                self.words.weight[1] = 0.7

        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.words(ids).mean(1)) @ self.words.weight.T

    model = Tied().double()
    data = torch.randint(5, (20, 4)), torch.randint(5, (20,))
    expected = OPERATORS[kind](model, *data)
    assert expected[3:6].any()
    op = kind(model, nn.CrossEntropyLoss(), data, engine=engine)
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-7)
    assert not model.words._forward_hooks


@pytest.mark.parametrize("engine", ["auto", "finite_difference"])
@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_bags_of_embeddings(kind: type[CurvatureOperator], mode: str, engine: str) -> None:
    """Torch has no second derivative of these."""
    bag = nn.EmbeddingBag(7, 3, mode=mode, sparse=True)
    model = nn.Sequential(bag, nn.Tanh(), nn.Linear(3, 3)).double()
    ids, target = torch.randint(7, (20, 4)), torch.randint(3, (20,))
    twin = Words(False).double()
    twin.words = nn.Embedding.from_pretrained(bag.weight.detach().clone(), freeze=False)
    twin.linear = copy.deepcopy(model[2])
    if mode == "sum":
        twin.words.register_forward_hook(lambda module, given, result: 4 * result)
    expected = OPERATORS[kind](twin, ids, target)
    op = kind(model, nn.CrossEntropyLoss(), (ids, target), engine=engine)
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-7)
    if kind is HessianOperator:
        assert isinstance(op, HessianOperator)
        model.zero_grad()
        F.cross_entropy(model(ids), target).backward()
        grads = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(op.gradient(), torch.cat([g.reshape(-1) for g in grads]))


class Reentrant(nn.Module):
    """Its middle runs again in backward, by reentrant checkpointing."""

    def __init__(self, again: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.again = nn.Linear(5, 4), nn.Linear(4, 3), again
        self.inside = nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.inside, self.first(x)))


def plainly(run: Callable[..., Tensor], x: Tensor) -> Tensor:
    return run(x)


def by_checkpoint(run: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(run, x, use_reentrant=True)


class Hidden(torch.autograd.Function):
    """Calls backward() inside its own, as reversible networks do: grad() finds no parameters."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        ctx.state = torch.get_rng_state()
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng([]):
            torch.set_rng_state(ctx.state)
            ctx.run(x).backward(grad)
        return None, x.grad


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("again", [by_checkpoint, Hidden.apply], ids=["checkpoint", "hidden"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_gradients_by_backward_alone(
    kind: type[CurvatureOperator],
    again: Any,
    mode: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, (_, x, target) = Reentrant(plainly).double(), make()
    expected = OPERATORS[kind](model, x, target, mode=mode)
    model.again = again
    gradient = model.last.weight.grad = torch.ones_like(model.last.weight)
    state = copy.deepcopy(model.state_dict())
    for engine in [*NAMES, "auto"]:
        op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=engine, mode=mode)
        if engine not in ("finite_difference", "auto"):
            with pytest.raises(RuntimeError, match=r"backward\(\) alone.*finite_difference"):
                op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
            continue
        with caplog.at_level(logging.INFO):
            torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-7)
        assert op.engine == "finite_difference"
        assert "backward() alone" in caplog.text
    assert model.last.weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(p.grad is None for p in model.parameters() if p is not model.last.weight)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("again", [plainly, by_checkpoint, Hidden.apply])
def test_the_gradient_elsewhere(again: Any) -> None:
    """Modules that backward runs again see that point too, also with grad()."""
    model, (_, x, target) = Reentrant(plainly).double(), make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    here = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    there = here + 0.3 * torch.randn_like(here)
    expected = op.gradient(there)
    assert (expected - op.gradient()).norm() > 0.05
    model.again = again
    other = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    torch.testing.assert_close(other.gradient(there), expected, rtol=0, atol=1e-13)
    now = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(now, here)

    def later(run: Callable[..., Tensor], x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=False)

    model.again = later
    third = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    torch.testing.assert_close(third.gradient(there), expected, rtol=0, atol=1e-13)


def test_hooks_that_would_run_raise() -> None:
    """An optimizer in the backward pass would take a step."""
    model, (_, x, target) = Reentrant(by_checkpoint).double(), make()
    ran = []
    model.last.weight.register_post_accumulate_grad_hook(lambda p: ran.append(p))
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    with pytest.raises(RuntimeError, match="remove the hooks first"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    assert not ran


class Forgetful(torch.autograd.Function):
    """A scale whose backward returns no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None


CUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "detached": lambda x, scale: x * scale.detach(),
    "data": lambda x, scale: x * scale.data,
    "number": lambda x, scale: x * scale.mean().item(),
    "numpy": lambda x, scale: x * torch.from_numpy(scale.detach().numpy()),
    "copy": lambda x, scale: x * torch.tensor(scale.tolist(), dtype=x.dtype),
    "function": lambda x, scale: Forgetful.apply(x, scale),
}


class Cut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = nn.Linear(5, 3), how
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 1.3]))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                scale = self.scale.exp()
            return torch.tanh(self.body(x)) * scale
        return CUTS[self.how](torch.tanh(self.body(x)), self.scale)


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("how", [*CUTS, "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parameter_without_gradient_is_named(how: str, engine: str, dtype: torch.dtype) -> None:
    model, (_, x, target) = Cut(how).to(dtype), make(dtype=dtype)
    state = copy.deepcopy(model.state_dict())
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"depends on scale, and no gradient reaches it"):
            op.matvec(torch.ones(op.shape[0], dtype=dtype))
    with pytest.raises(RuntimeError, match=r"depends on scale.*requires_grad_\(False\)"):
        op.gradient()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.scale.requires_grad_(False)
    fixed = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    assert fixed.shape[0] == 18 + 6
    if how != "function" or engine not in ("cached_graph", "per_pass_graph", "vmap"):
        return
    assert columns(fixed)[:18].any()


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_parameter_of_another_batch(kind: type[CurvatureOperator]) -> None:
    """A parameter that one batch does not use raises no error."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.left(x) if len(x) == 30 else self.right(x))

    model, (_, x, target) = Branching().double(), make()
    data = [(x[:30], target[:30]), (x[30:], target[30:])]
    expected = torch.zeros(36, 36, dtype=torch.float64)
    for batch, weight in zip(data, (0.75, 0.25), strict=True):
        expected += weight * OPERATORS[kind](model, *batch)
    for engine in ("auto", "per_pass_graph", "forward_over_reverse"):
        op = kind(model, nn.CrossEntropyLoss(), data, engine=engine)
        torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-12)


def test_perturbations_without_effect_do_not_raise() -> None:
    """sign and argmax have no gradient, and do not change with small perturbations."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.body = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.body(x)) * (1 + F.one_hot(self.gate(x).argmax(1), 3))

    model, (_, x, target) = Choosing().double(), make()
    result = columns(GGNOperator(model, nn.CrossEntropyLoss(), (x, target)))
    assert not result[:18].any()
    assert result[18:, 18:].any()


def test_a_residual_output_has_its_second_derivative() -> None:
    """The last operation returns the gradient that it gets."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.shift = nn.Linear(5, 3), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) + self.shift.square()

    model, (_, x, target) = Residual().double(), make()
    expected = OPERATORS[GGNOperator](model, x, target)
    for engine in NAMES:
        op = GGNOperator(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
        torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-8)
    assert dense(model, x, target).shape == expected.shape
