"""Cross-entropy with a fused second derivative: torch's function, in fewer steps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from eigenfilter.curvature import GGNOperator, HessianOperator
from eigenfilter.curvature.engines import NAMES
from eigenfilter.curvature.engines.derivative_graphs import graph_of
from eigenfilter.curvature.loss import cross_entropy
from eigenfilter.curvature.loss.autograd_graph import nodes, runs_python
from eigenfilter.curvature.loss.cross_entropy import CrossEntropy, FusedCrossEntropy

ROWS, CLASSES = 6, 11
TARGET = torch.tensor([1, 2, -100, 10, 0, 3])
WEIGHT = torch.linspace(0.1, 1.3, CLASSES, dtype=torch.float64)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "ignoring": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"weight": WEIGHT},
    "weights-smoothing": {"weight": WEIGHT, "label_smoothing": 0.3},
    "weights-smoothing-sum": {"weight": WEIGHT, "label_smoothing": 0.3, "reduction": "sum"},
}

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small logits are fused too."""
    monkeypatch.setattr(cross_entropy, "LEAST", 1)


def fused(*args: Any, **options: Any) -> Tensor:
    with FusedCrossEntropy():
        return F.cross_entropy(*args, **options)


def is_fused(loss: Tensor) -> bool:
    return any(getattr(type(n), "_forward_cls", None) is CrossEntropy for n in nodes([loss]))


def logits(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=random, dtype=torch.float64)


def target_of(options: dict[str, Any]) -> Tensor:
    return TARGET.where(TARGET >= 0, options.get("ignore_index", -100))


def by_backward(loss_fn: Loss) -> list[Tensor]:
    """The loss and its derivatives up to the third, by backward passes."""
    z, u = logits(ROWS, CLASSES).requires_grad_(), logits(ROWS, CLASSES, seed=1)
    seed = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    loss = loss_fn(z)
    (gradient,) = torch.autograd.grad(loss, z, seed, create_graph=True)
    second = torch.autograd.grad(gradient, [z, seed], u, create_graph=True)
    third = torch.autograd.grad(second[0], [z, seed], u**2, retain_graph=True)
    plain = torch.autograd.grad(gradient, [z, seed], u, retain_graph=True)
    several = torch.stack([u, -2 * u, u**2])
    batched = torch.autograd.grad(gradient, z, several, is_grads_batched=True)
    return [loss, gradient, *second, *third, *plain, *batched]


def by_forward_mode(loss_fn: Loss) -> list[Tensor]:
    z, u = logits(ROWS, CLASSES), logits(ROWS, CLASSES, seed=1)
    results: list[Tensor] = []
    for power in (1, 2):  # the second makes the seed of the loss depend on the logits

        def f(z: Tensor, power: int = power) -> Tensor:
            return loss_fn(z) ** power

        results += torch.func.jvp(f, (z,), (u,))
        results += torch.func.jvp(torch.func.grad(f), (z,), (u,))
    return results


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("derivatives", [by_backward, by_forward_mode])
@pytest.mark.parametrize("name", OPTIONS)
def test_all_derivatives_are_those_of_torch(
    name: str, derivatives: Callable[[Loss], list[Tensor]]
) -> None:
    options = OPTIONS[name]
    target = target_of(options)
    assert is_fused(fused(logits(ROWS, CLASSES).requires_grad_(), target, **options))
    expected = derivatives(lambda z: F.cross_entropy(z, target, **options))
    result = derivatives(lambda z: fused(z, target, **options))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)


def test_rows_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS["weights-smoothing"]
    whole = by_backward(lambda z: fused(z, TARGET, **options))
    monkeypatch.setitem(cross_entropy._PIECE, "cpu", 2 * CLASSES)
    pieces = by_backward(lambda z: fused(z, TARGET, **options))
    torch.testing.assert_close(pieces, whole, rtol=1e-13, atol=1e-14)


def test_logits_of_sequences_are_fused_if_classes_come_last_in_memory() -> None:
    z = logits(2, 5, CLASSES).requires_grad_()
    target = torch.arange(10).view(2, 5)
    loss = fused(z.transpose(1, 2), target)
    assert is_fused(loss)
    assert torch.allclose(loss, F.cross_entropy(z.transpose(1, 2), target))
    assert not is_fused(fused(logits(2, CLASSES, 5).requires_grad_(), target))


def test_logits_may_be_parameters_and_no_other_subclass() -> None:
    class Marked(Tensor):
        """A subclass of which we know nothing."""

    assert is_fused(fused(nn.Parameter(logits(ROWS, CLASSES)), TARGET))
    assert not is_fused(fused(logits(ROWS, CLASSES).as_subclass(Marked).requires_grad_(), TARGET))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_is_widened_in_pieces(
    name: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Derivatives are those of float32 at the rounded logits, rounded once at the end."""
    monkeypatch.setitem(cross_entropy._PIECE, "cpu", 2 * CLASSES)
    half, u = logits(ROWS, CLASSES).to(dtype), logits(ROWS, CLASSES, seed=1).to(dtype)

    def derivatives(dtype: torch.dtype) -> list[Tensor]:
        options = dict(OPTIONS[name])
        if "weight" in options:
            options["weight"] = WEIGHT.to(half.dtype).to(torch.float32 if autocast else dtype)
        z = half.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = fused(z, target_of(options), **options)
            expected = F.cross_entropy(z, target_of(options), **options)
        assert is_fused(loss)
        assert loss.dtype == expected.dtype
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        products = torch.autograd.grad(gradient, z, u.to(dtype), retain_graph=True)
        written_out = torch.autograd.grad(gradient, z, u.to(dtype), create_graph=True)
        return [loss, gradient, *products, *written_out]

    wide, rounded = derivatives(torch.float32), derivatives(dtype)
    for ours, exact in zip(rounded, wide, strict=True):
        torch.testing.assert_close(ours, exact.to(ours.dtype))


@pytest.mark.parametrize(
    ("z", "target", "options"),
    [
        (logits(ROWS, CLASSES), logits(ROWS, CLASSES).softmax(1), {}),
        (logits(CLASSES), torch.tensor(3), {}),
        (logits(ROWS, CLASSES), TARGET, {"reduction": "none"}),
        (logits(CLASSES, ROWS).T, TARGET, {}),
    ],
    ids=["probabilities", "no rows", "none", "transposed"],
)
def test_what_is_not_recognized_is_left_to_torch(
    z: Tensor, target: Tensor, options: dict[str, Any]
) -> None:
    z.requires_grad_()
    loss = fused(z, target, **options)
    assert not is_fused(loss)
    assert torch.equal(loss, F.cross_entropy(z, target, **options))


def test_small_logits_and_vmap_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits(ROWS, CLASSES)
    each = torch.vmap(lambda z, t: fused(z[None], t[None], ignore_index=5))(z, TARGET.abs() % 11)
    assert torch.allclose(each.sum(), fused(z, TARGET.abs() % 11, ignore_index=5, reduction="sum"))
    monkeypatch.setattr(cross_entropy, "LEAST", z.numel() + 1)
    assert not is_fused(fused(z.requires_grad_(), TARGET))


@pytest.mark.parametrize("target", [torch.full((ROWS,), CLASSES), torch.full((ROWS,), -1)])
def test_classes_that_there_are_not_raise(target: Tensor) -> None:
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        fused(logits(ROWS, CLASSES), target)


def test_the_mean_of_nothing_is_torchs() -> None:
    z, target = logits(ROWS, CLASSES).requires_grad_(), torch.full((ROWS,), -100)
    loss = fused(z, target)
    assert is_fused(loss)
    assert loss.isnan()
    assert F.cross_entropy(z, target).isnan()
    (ours,), (theirs,) = (torch.autograd.grad(f(z, target), z) for f in (fused, F.cross_entropy))
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert fused(z, target, reduction="sum") == 0


class LanguageModel(nn.Module):
    """Tokens [b, t] to logits [b, t, c]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 5)
        self.hidden = nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.hidden(self.embedding(tokens)).tanh())
        return result


def next_token(z: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of soft-capped logits, and a z-loss."""
    capped = 4 * (z / 4).tanh()
    rows = capped.flatten(0, 1)
    z_loss = rows.logsumexp(1).square().mean()
    return F.cross_entropy(rows, target.flatten(), label_smoothing=0.1) + 0.05 * z_loss


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = LanguageModel().double()
    tokens = torch.randint(CLASSES, (2, 3, 8))
    return model, [(t[:, :-1], t[:, 1:]) for t in tokens]


@pytest.mark.parametrize("engine", [n for n in NAMES if n != "finite_difference"] + ["auto"])
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_matrices_are_the_same_with_every_engine(
    kind: type[HessianOperator | GGNOperator],
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, data = problem()
    with caplog.at_level(logging.INFO):
        matrix = kind(model, next_token, data, engine=engine).to_dense()
    assert "cross_entropy of many logits has a fused product" in caplog.text
    monkeypatch.setattr(cross_entropy, "LEAST", 1 << 30)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        expected = kind(model, next_token, data, engine=engine).to_dense()
    assert "cross_entropy" not in caplog.text
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-13)


def test_a_loss_that_ignores_tokens_weighs_as_before() -> None:
    model, data = problem()
    data = [(x, t.where(t > 2, -100)) for x, t in data]
    loss_fn = nn.CrossEntropyLoss()

    def tokens(batch: Any) -> float:
        return float((batch[1] != -100).sum())

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0]).flatten(0, 1), batch[1].flatten()

    matrix = HessianOperator(model, loss_fn, data, forward=forward, weight=tokens).to_dense()
    joined = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
    whole = HessianOperator(model, loss_fn, joined, forward=forward, weight=tokens).to_dense()
    torch.testing.assert_close(matrix, whole, rtol=1e-9, atol=1e-12)


def arrays_allocated(run: Callable[[], object], size: int) -> list[float]:
    """The memory that is allocated from time to time while `run` runs, over that of one array."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return [total / size for total in itertools.accumulate(sizes)]


def arrays_at_most(run: Callable[[], object], size: int) -> float:
    """The most memory that is allocated at once while `run` runs, over that of one array."""
    return max(arrays_allocated(run, size))


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_a_product_takes_few_arrays_of_the_size_of_the_logits(
    kind: type[HessianOperator | GGNOperator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the linear map before them one, and the product; torch's own takes five."""
    classes, rows, width = 4000, 64, 4
    head = nn.Linear(width, classes, bias=False)
    batch = torch.randn(rows, width), torch.randint(classes, (rows,))
    most, kept = {}, {}
    for least in (1, 1 << 30):
        monkeypatch.setattr(cross_entropy, "LEAST", least)
        operator = kind(head, nn.CrossEntropyLoss(), batch)
        operator._objective.evaluate(0, batch)  # with the checks of a first evaluation
        graphs = []

        def build(operator: Any = operator, graphs: list[Any] = graphs) -> None:
            graphs.append(graph_of(operator._objective.evaluate(0, batch), operator.params))

        kept[least == 1] = arrays_allocated(build, 4 * rows * classes)[-1]
        (graph,) = graphs
        fused_here = least == 1
        assert not (fused_here and runs_python(graph.roots))
        v = [torch.randn_like(head.weight)]
        graph.product(v)
        most[fused_here] = arrays_at_most(lambda g=graph, v=v: g.product(v), 4 * rows * classes)
    assert kept[True] < 1.3  # the logits
    assert kept[False] > 1.8
    assert most[True] < 2.3
    assert most[False] > 4
