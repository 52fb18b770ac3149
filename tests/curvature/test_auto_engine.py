"""The choices of engine="auto" when engines fail, and the checks of forward mode."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature.networks import OPERATORS, columns, dense, make
from eigenfilter.curvature import CurvatureOperator, GGNOperator, HessianOperator
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow

LOGGER = "eigenfilter.curvature.engines.automatic"


def penalized(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy and the squared gradient with respect to some inputs."""
    points = torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5)

    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["model"] = model

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            x = points.clone().requires_grad_()
            (g,) = torch.autograd.grad(self.model(x).square().sum(), x, create_graph=True)
            return F.cross_entropy(output, target) + g.square().mean()

    return Penalized()


class Physics(nn.Module):
    """u + du/dx, by autograd or by torch.func."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:

            def u(point: Tensor) -> Tensor:
                return self.net(point).squeeze(-1)

            return torch.func.vmap(torch.func.grad(u))(x)[:, :3] + self.net(x)
        x = x.detach().requires_grad_()
        result = self.net(x)
        (g,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        return g[:, :3] + result


class Adapted(nn.Module):
    """A step of gradient descent inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.linear.weight, self.linear.bias
        inner = F.linear(x[:1], w, b).square().mean()
        (g,) = torch.autograd.grad(inner, w, create_graph=True)
        return torch.tanh(F.linear(x, w - 0.3 * g, b))


INSIDE: dict[str, Callable[[], nn.Module]] = {
    "physics": lambda: Physics(False),
    "physics, functional": lambda: Physics(True),
    "adapted": Adapted,
}


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind", OPERATORS)
def test_derivatives_inside_the_model(
    kind: type[CurvatureOperator], name: str, engine: str
) -> None:
    model, (_, x, target) = INSIDE[name]().double(), make()
    if name == "adapted" and engine == "microbatched":
        x = x[:1].expand(len(x), -1).contiguous()  # the same in every piece
    expected = _dense(kind, model, x, target)
    op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    assert_right_or_refused(op, expected, engine)


def _dense(
    kind: type[CurvatureOperator],
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Return the matrix by loops over autograd, on the model's own parameters."""
    params = list(model.parameters())

    def rows(values: Tensor, again: bool = False) -> Tensor:
        result = [
            torch.autograd.grad(
                v, params, retain_graph=True, create_graph=again, materialize_grads=True
            )
            for v in values.reshape(-1)
        ]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in result])

    z = model(x)
    if kind is HessianOperator:
        return rows(rows(loss_fn(z, target).reshape(1), True)[0])
    if kind is GGNOperator:
        J, p = rows(z), torch.softmax(z.detach(), 1)
        H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(z)
        return J.T @ torch.block_diag(*H) @ J
    G = rows(torch.stack([loss_fn(z[i : i + 1], target[i : i + 1]) for i in range(len(z))]))
    return G.T @ G / len(G)


def assert_right_or_refused(op: CurvatureOperator, expected: Tensor, engine: str) -> None:
    """Fail unless the matrix is right; forward_over_reverse may raise and name another engine."""
    try:
        result = columns(op)
    except RuntimeError as error:
        if (
            engine != "forward_over_reverse"
            or "use engine='cached_graph'" not in error.__notes__[0]
        ):
            raise
        return
    scale = float(expected.abs().max())
    atol = 1e-7 if op.engine == "finite_difference" else 1e-12
    torch.testing.assert_close(result, expected, rtol=0, atol=atol * scale)
    assert engine != "auto" or op.engine != "finite_difference"


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_derivatives_inside_the_loss(kind: type[CurvatureOperator], engine: str) -> None:
    model, x, target = make()
    x, target = x[:8], target[:8]
    loss_fn = penalized(model)
    op = kind(model, loss_fn, (x, target), engine=engine)
    if kind is GGNOperator:  # the penalty is no function of z
        expected = OPERATORS[kind](model, x, target)
    else:
        expected = _dense(kind, model.eval(), x, target, loss_fn)
    assert_right_or_refused(op, expected, engine)


@pytest.mark.parametrize("name", ["linear", "mlp", "gru", "lstm", "rnn"])
@pytest.mark.parametrize("loss_fn", rest_slow([nn.MSELoss(), nn.HuberLoss(), nn.SoftMarginLoss()]))
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_forward_mode_and_losses_of_constants(
    kind: type[CurvatureOperator], loss_fn: nn.Module, name: str
) -> None:
    """Torch gives constants immutable zero tangents: explicit ones are used, or it raises."""

    class Last(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.unsqueeze(1))[0].squeeze(1)

    layers = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
    model = (
        Last(layers[name](5, 3, batch_first=True)).double()
        if name in layers
        else (nn.Linear(5, 3).double() if name == "linear" else make()[0])
    )
    x, target = torch.randn(6, 5).double(), torch.rand(6, 3).double()
    expected = OPERATORS[kind](model, x, target, loss_fn=loss_fn)
    forward = kind(model, loss_fn, (x, target), engine="forward_over_reverse")
    assert_right_or_refused(forward, expected, "forward_over_reverse")
    if isinstance(loss_fn, nn.MSELoss):
        assert columns(forward).any()
    assert_right_or_refused(kind(model, loss_fn, (x, target)), expected, "auto")


def test_forward_mode_does_not_miss_a_parameter_from_elsewhere() -> None:
    """Modules get dual parameters; a parameter that a loss refers to directly does not."""
    model, x, target = make()
    held = model.get_parameter("0.weight")

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + held.square().sum()

    v = torch.randn(39, dtype=torch.float64)
    exact = HessianOperator(model, loss_fn, (x, target), engine="cached_graph").matvec(v)
    plain = dense(model, x, target) @ v
    torch.testing.assert_close(exact[:20], plain[:20] + 2 * v[:20], rtol=0, atol=1e-12)
    op = HessianOperator(model, loss_fn, (x, target), engine="forward_over_reverse")
    with pytest.raises(RuntimeError, match=r"not take from its module.*use engine='cached_graph'"):
        op.matvec(v)
    assert torch.equal(HessianOperator(model, loss_fn, (x, target)).matvec(v), exact)


def test_forward_mode_does_not_draw_another_mask() -> None:
    """For a transposed tensor it would, because its mask gets another layout."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(torch.tanh(self.linear(x).T), 0.5, self.training).T

    model, (_, x, target) = Turned().double(), make()
    data, loss_fn = (x, target), nn.CrossEntropyLoss()
    op = HessianOperator(model, loss_fn, data, mode="train", engine="forward_over_reverse")
    with pytest.raises(RuntimeError, match=r"another value.*use engine='cached_graph'"):
        columns(op)
    evaluated = HessianOperator(model, loss_fn, data, engine="forward_over_reverse")
    torch.testing.assert_close(columns(evaluated), dense(model, x, target), rtol=0, atol=1e-12)


def test_the_next_engine_and_why(caplog: pytest.LogCaptureFixture) -> None:
    """A bag of embeddings has no second derivative in torch."""
    model = nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = (torch.randint(6, (20, 5)), torch.randint(3, (20,)))
    op = HessianOperator(model, nn.CrossEntropyLoss(), data)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    with caplog.at_level(logging.INFO, LOGGER):
        result = op.matvec(v)
    assert op.engine == "finite_difference"
    messages = [(r.levelno, r.getMessage()) for r in caplog.records if r.name == LOGGER]
    passed = ["cached_graph", "per_pass_graph", "forward_over_reverse", "microbatched"]
    assert [text.split("'")[1] for _, text in messages] == passed
    assert all("NotImplementedError" in text for _, text in messages)
    assert messages[-1][0] == logging.WARNING
    assert "'finite_difference', whose products are not exact" in messages[-1][1]
    caplog.clear()
    again = op.matvec(v)
    assert not [r for r in caplog.records if r.name == LOGGER]
    torch.testing.assert_close(again, result, rtol=0, atol=1e-9)


def test_one_error_lists_all_engines() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            Broken.calls += 1
            raise NotImplementedError(f"no derivative, {Broken.calls}")

        calls = 0

    model, x, target = make()
    op = HessianOperator(model, lambda z, t: F.cross_entropy(Broken.apply(z), t), (x, target))
    with pytest.raises(RuntimeError, match="no engine can multiply by this matrix") as raised:
        op.matvec(torch.ones(39, dtype=torch.float64))
    lines = str(raised.value).splitlines()
    named = [line.split(":")[0].removeprefix("- ") for line in lines if line.startswith("- ")]
    assert sorted(named) == sorted(set(NAMES) - {"vmap"})
    assert "operations that torch can differentiate" in lines[-1]


def test_the_error_of_a_model_is_its_own() -> None:
    """It is not repeated with every engine and not wrapped, also in a later batch."""
    model, x, target = make()
    calls = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if len(output) == 10:
            raise KeyError("mine")
        return F.cross_entropy(output, target)

    v = torch.ones(39, dtype=torch.float64)
    first = HessianOperator(model, loss_fn, (x[:10], target[:10]))
    with pytest.raises(KeyError, match="mine"):
        first.matvec(v)
    assert calls == 1
    later = HessianOperator(model, loss_fn, [(x[10:], target[10:]), (x[:10], target[:10])])
    with pytest.raises(KeyError, match="mine"):
        later.matvec(v)


def test_the_next_engine_follows_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    v = torch.randn(39, dtype=torch.float64)
    expected = dense(model, x, target) @ v
    from eigenfilter.curvature.engines import graph_cache

    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(graph_cache, "graph_of", full)
    torch.testing.assert_close(op.matvec(v), expected, rtol=0, atol=1e-12)
    assert op.engine == "forward_over_reverse"


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("gone"), ValueError("gone")])
@pytest.mark.parametrize("after", [0, 25])
def test_data_that_cannot_be_read_once_leave_the_engine(error: Exception, after: int) -> None:
    model, x, target = make()
    reads = 0

    class Flaky(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            nonlocal reads
            reads += 1
            if reads == after + 1:
                raise error
            return x[i], target[i]

    loader = torch.utils.data.DataLoader(Flaky(), batch_size=20)
    op = HessianOperator(model, F.cross_entropy, loader, memory_budget=10**7)
    with pytest.raises(type(error), match="gone"):
        columns(op)
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-12)
    assert op.engine != "finite_difference"


WEIGHTS: dict[str, Any] = {
    "None": lambda batch: None,
    "several": lambda batch: torch.ones(2),
    "raises": lambda batch: batch["labels"],
}


@pytest.mark.parametrize("engine", ["auto", *NAMES])
@pytest.mark.parametrize("case", WEIGHTS)
def test_a_weight_that_is_no_number_raises(engine: str, case: str) -> None:
    model, x, target = make()
    batches = [(x[:20], target[:20]), (x[20:], target[20:])]
    op = HessianOperator(model, F.cross_entropy, batches, weight=WEIGHTS[case], engine=engine)
    with pytest.raises(ValueError, match="weight= gave no number"):
        op.matvec(torch.ones(39, dtype=torch.float64))


def test_sparse_vectors_raise() -> None:
    model, x, target = make()
    op = HessianOperator(model, F.cross_entropy, (x, target))
    V = torch.eye(39, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"V must be dense.*to_dense"):
        op @ V.to_sparse()
    with pytest.raises(ValueError, match=r"v must be dense.*to_dense"):
        op @ V[0].to_sparse()
    torch.testing.assert_close(op @ V, dense(model, x, target), rtol=0, atol=1e-12)


def test_long_errors_are_shortened() -> None:
    model, x, target = make()
    calls = 0

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError(f"call {calls}" + "x" * 10_000)
        return F.cross_entropy(z, t)

    op = HessianOperator(model, loss_fn, (x, target))
    with pytest.raises(RuntimeError, match="no engine can multiply") as caught:
        columns(op)
    assert len(str(caught.value)) < 6000
