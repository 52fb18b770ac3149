"""f is one fixed function, whatever hooks parameters have and whether they require grad."""

from __future__ import annotations

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


def assert_products(op: CurvatureOperator, expected: Tensor) -> None:
    """Fail unless the products with all unit vectors are the columns of the matrix."""
    result = columns(op)
    atol = 1e-7 if op.engine == "finite_difference" else 1e-11  # of "auto", what it took
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=0, atol=atol * scale)


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("hook", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: 2 * g])
@pytest.mark.parametrize("kind", OPERATORS)
def test_hooks_of_parameters_have_no_effect(
    kind: type[CurvatureOperator], hook: Callable[[Tensor], Tensor], engine: str
) -> None:
    """They do not run in a product or a gradient, and exist afterwards."""
    model, x, target = make()
    model.eval()
    expected = OPERATORS[kind](model, x, target)
    params = list(model.parameters())
    exact = torch.autograd.grad(F.cross_entropy(model(x), target), params)
    handles = [p.register_hook(hook) for p in params]
    op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    assert_products(op, expected)
    if isinstance(op, HessianOperator):
        flat = torch.cat([g.flatten() for g in exact])
        torch.testing.assert_close(op.gradient(), flat, rtol=0, atol=1e-13)
    F.cross_entropy(model(x), target).backward()
    for p, g in zip(params, exact, strict=True):
        assert torch.equal(p.grad, hook(g))
    for handle in handles:
        handle.remove()
    assert not any(p._backward_hooks for p in params)


def test_hooks_where_gradients_come_by_backward_alone() -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, target = torch.randn(9, 3, dtype=torch.float64), torch.randint(3, (9,))
    expected = dense(inner, x, target)

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=True)

    hook_calls: list[Tensor] = []
    for p in inner.parameters():
        p.register_hook(hook_calls.append)
    op = HessianOperator(Again(), nn.CrossEntropyLoss(), (x, target), engine="finite_difference")
    assert_products(op, expected)
    op.gradient()
    assert not hook_calls


class Inner(nn.Module):
    """Computes its own gradient in the forward pass, which a parameter's hook then scales."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.linear.weight
        (g,) = torch.autograd.grad(torch.tanh(self.linear(x)).sum(), w, create_graph=True)
        return torch.tanh(x @ (w - 0.3 * g).T)


@pytest.mark.parametrize("engine", ["cached_graph", "vmap", "finite_difference"])
def test_hooks_run_in_derivatives_inside_f(engine: str) -> None:
    x, target = torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,))
    model = Inner().double()
    w = model.linear.weight
    b = model.linear.bias

    def f(flat: Tensor) -> Tensor:
        v, c = flat[:6].view(2, 3), flat[6:]
        g = (1 - torch.tanh(x @ v.T + c) ** 2).T @ x
        return F.cross_entropy(torch.tanh(x @ (v - 0.6 * g).T), target)

    point = torch.cat([w.detach().flatten(), b.detach()])
    expected = torch.autograd.functional.hessian(f, point)
    w.register_hook(lambda g: 2 * g)
    assert_products(HessianOperator(model, F.cross_entropy, (x, target), engine=engine), expected)


class Penalized(nn.Module):
    """Penalizes parameters that require grad: without any, f is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        training = [p for p in self.parameters() if p.requires_grad]
        return self.linear(x) * (1 + sum((p**2).sum() for p in training))


class Refusing(Penalized):
    """Raises an error of its own if no parameter requires grad."""

    def forward(self, x: Tensor) -> Tensor:
        training = [p for p in self.parameters() if p.requires_grad]
        if not training:
            raise KeyError("nothing trains")
        return self.linear(x) * (1 + torch.stack([p.square().sum() for p in training]).sum())


class Adapted(nn.Module):
    """MAML: the loss after a step, which is skipped if no parameter requires grad."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.linear.weight
        if w.requires_grad:
            (g,) = torch.autograd.grad(torch.tanh(x @ w.T).sum(), w, create_graph=True)
            w = w - 0.1 * g
        return F.linear(x, w, self.linear.bias)


@pytest.mark.parametrize("engine", ["cached_graph", "microbatched", "finite_difference"])
@pytest.mark.parametrize("model", [Penalized, Refusing, Adapted])
@pytest.mark.parametrize("kind", OPERATORS)
def test_f_may_depend_on_requires_grad(
    kind: type[CurvatureOperator], model: type[nn.Module], engine: str
) -> None:
    """An evaluation without a graph has the same value."""
    torch.manual_seed(0)
    network = model().double()
    if model is not Adapted:
        network.linear.bias.requires_grad_(False)
    x, target = torch.randn(16, 3, dtype=torch.float64), torch.randint(3, (16,))
    budget = {"memory_budget": 4_000} if engine == "microbatched" else {}
    op = kind(network, nn.CrossEntropyLoss(), (x, target), engine=engine, **budget)
    if model is Adapted and engine == "microbatched":  # the inner step couples samples
        with pytest.raises(ValueError, match="samples are coupled"):
            op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
        return
    sizes = [p.numel() for p in op.params]
    point = torch.cat([p.detach().flatten() for p in op.params])

    def output(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        w = parts[0].view(3, 3)
        if model is Adapted:
            slope = (1 - torch.tanh(x @ w.T) ** 2).T @ x
            return x @ (w - 0.1 * slope).T + parts[1]
        return (x @ w.T + network.linear.bias.detach()) * (1 + w.square().sum())

    def losses(flat: Tensor) -> Tensor:
        return F.cross_entropy(output(flat), target, reduction="none")

    jacobian = torch.autograd.functional.jacobian
    if kind is HessianOperator:
        expected = torch.autograd.functional.hessian(lambda v: losses(v).mean(), point)
    elif kind is GGNOperator:
        J = jacobian(output, point).view(-1, len(point))
        z = output(point)
        phi = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, target), z)
        expected = J.T @ phi.view(len(J), len(J)) @ J
    else:
        J = jacobian(losses, point)
        expected = J.T @ J / len(x)
    assert_products(op, expected)


class Bag(nn.Module):
    """Torch's embedding modules with options; indices occur several times."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.words = kind(6, 3, **options)
        self.linear = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.linear(torch.tanh(x.mean(1) if x.ndim == 3 else x))


WORDS = [nn.Embedding, nn.EmbeddingBag]
OPTIONS: list[dict[str, Any]] = [
    {"max_norm": 0.5},
    {"max_norm": 0.7, "norm_type": 1.0},
    {"scale_grad_by_freq": True},
    {"max_norm": 0.5, "scale_grad_by_freq": True},
]


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("words", WORDS)
def test_embeddings_with_options(
    words: type[nn.Module], options: dict[str, Any], engine: str
) -> None:
    """No row is rewritten, and the matrix equals that of the plain embedding."""
    torch.manual_seed(0)
    model = Bag(words, **options).double()
    ids, target = torch.randint(5, (16, 4)), torch.randint(3, (16,))
    model.words(torch.arange(6).unsqueeze(0))
    plain = Bag(nn.Embedding).double()  # torch lacks second derivatives of bags
    plain.load_state_dict(model.state_dict())
    expected = dense(plain, ids, target)
    op = HessianOperator(model, nn.CrossEntropyLoss(), (ids, target), engine=engine)
    try:
        assert_products(op, expected)
    except RuntimeError as error:  # torch's embedding bags lack the derivatives
        able = words is nn.Embedding or engine in ("finite_difference", "auto")
        if able or "engine='finite_difference'" not in error.__notes__[0]:
            raise
    assert torch.equal(model.words.weight, plain.words.weight)
    for name, value in options.items():
        assert getattr(model.words, name) == value


@pytest.mark.parametrize("words", WORDS)
def test_rows_beyond_max_norm_raise(words: type[nn.Module]) -> None:
    """It raises before anything is written, and the remedy of the message helps."""
    torch.manual_seed(0)
    model = Bag(words, max_norm=0.5).double()
    before = model.words.weight.detach().clone()
    ids, target = torch.randint(5, (16, 4)), torch.randint(3, (16,))
    op = HessianOperator(model, nn.CrossEntropyLoss(), (ids, target))
    for take in (op.gradient, lambda: op.matvec(torch.ones(op.shape[0], dtype=torch.float64))):
        with pytest.raises(RuntimeError, match=r"rows of words are longer than max_norm"):
            take()
    assert torch.equal(model.words.weight, before)
    model.words(torch.arange(model.words.num_embeddings).unsqueeze(0))
    assert op.gradient().isfinite().all()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("engine", ["auto", "cached_graph", "finite_difference"])
@pytest.mark.parametrize("whole", [False, True])
def test_reentrant_checkpoints_of_inputs_without_gradients(whole: bool, engine: str) -> None:
    """They cut the graph; the message has the remedy, and is the only one."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            if whole:
                return checkpoint(lambda x: self.last(self.first(x)), x, use_reentrant=True)
            return self.last(torch.tanh(checkpoint(self.first, x, use_reentrant=True)))

    model = Again().double()
    x, target = torch.randn(9, 3, dtype=torch.float64), torch.randint(3, (9,))
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    with pytest.raises(RuntimeError, match=r"^the loss .* pass use_reentrant=False") as caught:
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    assert "no engine can" not in str(caught.value)


class Detaching(nn.Module):
    """Detaches its first weight if the first number of an input is above 5."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.first.weight
        if bool((x[:, 0] > 5).any()):
            w = w.detach()
        return self.last(torch.tanh(F.linear(x, w, self.first.bias)))


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("kind", OPERATORS)
def test_a_gradient_that_some_batches_lack(
    kind: type[CurvatureOperator], two_batches: bool, engine: str
) -> None:
    """In the second batch, or in rows that a check of part of the batch does not cover."""
    x, target = torch.randn(32, 3, dtype=torch.float64), torch.randint(3, (32,))
    x[30, 0] = 6.0
    halves = list(zip(x.chunk(2), target.chunk(2), strict=True))
    model = Detaching().double()
    options = {"memory_budget": 10_000} if engine == "microbatched" else {}
    op = kind(
        model,
        nn.CrossEntropyLoss(),
        halves if two_batches else (x, target),
        engine=engine,
        **options,
    )
    with pytest.raises(RuntimeError, match=r"depends on first\.weight, and no gradient"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("engine", ["cached_graph", "finite_difference", "auto"])
def test_a_parameter_without_use_in_a_batch(engine: str) -> None:
    """Its rows of that batch are zero, without an error."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.experts[int(x[0, 0] > 0)](x))

    model = Experts().double()
    x, target = torch.randn(8, 3, dtype=torch.float64), torch.randint(3, (8,))
    data = [(x.abs(), target), (-x.abs(), target)]
    expected = sum(dense(model, *batch) for batch in data) / 2
    assert isinstance(expected, Tensor)
    assert_products(HessianOperator(model, nn.CrossEntropyLoss(), data, engine=engine), expected)
