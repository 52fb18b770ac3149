"""How the weights of batches are checked, whatever the targets and the loss are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvature.losses import CLASSES, of_classes, split, summed, weighted
from curvature.networks import columns, dense, dense_ggn, make
from eigenfilter.curvature import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
)

MEANS: list[type[CurvatureOperator]] = [HessianOperator, GGNOperator]


def tokens(batch: Any) -> Tensor:
    return (batch["y"] != -100).sum()


def padded() -> Iterator[tuple[nn.Module, list[dict[str, Tensor]]]]:
    """Sequences of one length, and of others in every batch."""
    for lengths in ((5, 5, 5), (5, 7, 3)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 6)).double()
        batches = []
        for samples, length in zip((4, 3, 1), lengths, strict=True):
            x = torch.randint(6, (samples, length))
            y = x.roll(1, 1)
            for row in range(samples):
                y[row, length - row :] = -100
            batches.append({"x": x, "y": y})
        yield model, batches


@pytest.mark.parametrize("kind", MEANS)
def test_tokens_that_are_padding(kind: type[CurvatureOperator]) -> None:
    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"]), batch["y"]

    for model, batches in padded():
        with pytest.raises(ValueError, match="weight="):
            columns(kind(model, loss_fn, batches, forward=forward))
        op = kind(model, loss_fn, batches, forward=forward, weight=tokens)
        x, y = (torch.cat([batch[key].flatten() for batch in batches]) for key in ("x", "y"))
        whole = (dense if kind is HessianOperator else dense_ggn)(model, x, y)
        torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-12)


def test_a_loss_that_the_model_returns_is_checked_by_halves() -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        z = model(batch["x"])
        return F.cross_entropy(z.flatten(0, 1), batch["y"].flatten()), None

    def loss_fn(loss: Tensor, _: None) -> Tensor:
        return loss

    for model, batches in padded():
        options = {"forward": forward, "engine": "per_pass_graph"}
        op = HessianOperator(model, loss_fn, batches, weight=tokens, **options)
        x, y = (torch.cat([batch[key].flatten() for batch in batches]) for key in ("x", "y"))
        torch.testing.assert_close(columns(op), dense(model, x, y), rtol=0, atol=1e-12)
        wrong = HessianOperator(model, loss_fn, batches, weight=lambda b: len(b["x"]), **options)
        with pytest.raises(ValueError, match=r"is not their weighted mean.*weight="):
            columns(wrong)
        plain = HessianOperator(model, loss_fn, batches, weight=lambda batch: 1.0, **options)
        assert columns(plain).isfinite().all()


def test_targets_that_cannot_be_divided_are_accepted() -> None:
    model, x, target = make()

    class Graph:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    batches = [(a, Graph(b)) for a, b in split(x, target, 25, 15)]
    op = HessianOperator(model, lambda z, g: F.cross_entropy(z, g.y), batches)
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_rounding_is_not_mistaken_for_a_weight(
    dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 200)).to(dtype)
    x, target = torch.randn(700, 30, dtype=dtype), torch.randint(200, (700,))
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=dtype)
    batches = split(x, target, 512, 187, 1)
    op = HessianOperator(model, F.cross_entropy, batches, autocast=autocast)
    assert op.matvec(v).isfinite().all()
    target[:40] = -100
    op = HessianOperator(model, F.cross_entropy, split(x, target, 512, 187, 1), autocast=autocast)
    if autocast is None:
        with pytest.raises(ValueError, match="weight="):
            op.matvec(v)


def test_each_batch_is_checked_once() -> None:
    model, x, target = make()
    calls = 0

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(z, t)

    op = HessianOperator(model, loss_fn, split(x, target, 20, 14, 6), engine="per_pass_graph")
    v = torch.ones(39, dtype=torch.float64)
    op.matvec(v)
    calls = 0
    op.matvec(v)
    with torch.no_grad():
        model[0].weight.mul_(2)
    op.matvec(v)
    assert calls == 6


def whole_targets() -> dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[Tensor], Any]]]:
    """Losses with class weights, and targets that are not only tensors with a row a sample."""

    def scaled(z: Tensor, t: Any) -> Tensor:
        return weighted(z / t[1], t[0])

    def by_list(z: Tensor, t: Any) -> Tensor:
        return weighted(z, torch.as_tensor(t))

    return {
        "list": (by_list, lambda t: t.tolist()),
        "tuple": (by_list, lambda t: tuple(t.tolist())),
        "array": (by_list, lambda t: t.numpy()),
        "list of text": (
            lambda z, t: by_list(z, list(map(int, t))),
            lambda t: list(map(str, t.tolist())),
        ),
        "number beside": (scaled, lambda t: (t, 2.0)),
        "tensor [] beside": (scaled, lambda t: (t, torch.tensor(2.0, dtype=torch.float64))),
        "class weights beside": (
            lambda z, t: F.cross_entropy(z, t["y"], weight=t["classes"]),
            lambda t: {"y": t, "classes": CLASSES, "name": "classes"},
        ),
    }


@pytest.mark.parametrize("case", whole_targets())
@pytest.mark.parametrize("kind", MEANS)
def test_targets_that_are_not_only_tensors_of_rows(
    kind: type[CurvatureOperator], case: str
) -> None:
    loss_fn, change = whole_targets()[case]
    model, x, target = make()
    pairs = split(x, target, 20, 14, 6)
    batches = [(a, change(b)) for a, b in pairs]
    with pytest.raises(ValueError, match="weight="):
        columns(kind(model, loss_fn, batches))
    sums = {id(batch): of_classes(pair) for batch, pair in zip(batches, pairs, strict=True)}
    op = kind(model, loss_fn, batches, weight=lambda batch: sums.get(id(batch), math.nan))
    matrix = dense if kind is HessianOperator else dense_ggn
    scale = 2.0 if loss_fn.__name__ == "scaled" else 1.0
    whole = matrix(model, x, target, loss_fn=lambda z, t: weighted(z / scale, t))
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-12)


def test_a_batch_that_cannot_be_checked_is_logged_once(caplog: Any) -> None:
    model, x, target = make()

    class Graph:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    batches = [(a, Graph(b)) for a, b in split(x, target, 20, 14, 6)]
    columns(HessianOperator(model, lambda z, g: weighted(z, g.y), batches))
    records = [one for one in caplog.records if "cannot be checked" in one.getMessage()]
    assert len(records) == 1
    assert records[0].levelname == "WARNING"


@pytest.mark.parametrize("classes", [False, True])
def test_a_loss_with_an_inconclusive_derivative_is_checked_by_halves(classes: bool) -> None:
    """A network that is differentiated by its inputs, where outputs need a graph."""

    def loss_fn(z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        x, w = target
        slope = torch.autograd.grad(z.sum(), x, create_graph=True)[0].square().sum(1)
        return (w * (slope + z.square().sum(1))).sum() / w.sum()

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        x = batch[0].detach().requires_grad_()
        return model(x), (x, batch[1])

    model, x, _ = make()
    w = torch.linspace(1, 40, 40, dtype=torch.float64) if classes else torch.ones(40).double()
    batches = split(x, w, 20, 14, 6)
    op = HessianOperator(model, loss_fn, batches, forward=forward, engine="per_pass_graph")
    if classes:
        with pytest.raises(ValueError, match="weight="):
            columns(op)
        op = HessianOperator(
            model,
            loss_fn,
            batches,
            forward=forward,
            engine="per_pass_graph",
            weight=lambda b: b[1].sum(),
        )

    params = dict(model.named_parameters())
    shapes = [p.shape for p in params.values()]

    def f(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        tensors = {k: p.view(s) for k, p, s in zip(params, parts, shapes, strict=True)}
        a = x.detach().clone().requires_grad_()
        return loss_fn(functional_call(model.eval(), tensors, (a,)), (a, w))

    at_x = torch.cat([p.detach().flatten() for p in params.values()])
    whole = torch.autograd.functional.hessian(f, at_x)
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-10)


def test_errors_distinguish_a_sum_from_other_losses() -> None:
    model, x, target = make()
    batches = split(x, target, 20, 14, 6)
    with pytest.raises(ValueError, match=r"it adds up over samples, so pass reduction='sum'"):
        columns(HessianOperator(model, summed, batches))

    def root(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t).sqrt()

    def logarithm(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t).log()

    for loss_fn in (root, logarithm):
        with pytest.raises(ValueError, match=r"(?s)loss_fn.*weight=lambda batch: 1\.0") as caught:
            columns(HessianOperator(model, loss_fn, batches))
        assert "it adds up" not in str(caught.value)
        op = HessianOperator(model, loss_fn, batches, weight=lambda batch: 1.0)
        parts = [dense(model, *batch, loss_fn=loss_fn) for batch in batches]
        torch.testing.assert_close(columns(op), sum(parts) / 3, rtol=0, atol=1e-11)


def test_a_fisher_with_ignored_samples_names_the_losses_a_sample(caplog: Any) -> None:
    model, x, target = make()
    target[3] = -100
    op = EmpiricalFisherOperator(
        model, F.cross_entropy, (x, target), engine="microbatched", memory_budget=2000
    )
    result = columns(op)
    assert "reduction='none'" in caplog.text
    valid = target != -100

    def losses(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in model.parameters()])
        tensors = {
            name: part.view_as(p)
            for (name, p), part in zip(model.named_parameters(), parts, strict=True)
        }
        z = functional_call(model.eval(), tensors, (x[valid],))
        return F.cross_entropy(z, target[valid], reduction="none")

    at_x = torch.cat([p.detach().flatten() for p in model.parameters()])
    J = torch.autograd.functional.jacobian(losses, at_x)
    torch.testing.assert_close(result, J.T @ J / 40, rtol=0, atol=1e-12)
    caplog.clear()
    alone = partial(F.cross_entropy, reduction="none")
    op = EmpiricalFisherOperator(
        model, alone, (x, target), engine="microbatched", memory_budget=2000
    )
    torch.testing.assert_close(columns(op), J.T @ J / 40, rtol=0, atol=1e-12)
    assert "reduction='none'" not in caplog.text


def test_outputs_that_differ_in_two_other_dimensions_are_logged(caplog: Any) -> None:
    """A difference in one other dimension raises if the loss shows it: see test_time_first.py."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    sizes = ((4, 7, 2), (4, 3, 5))
    batches = [(torch.randn(*size, 5).double(), torch.randn(*size, 3).double()) for size in sizes]
    op = HessianOperator(model, F.mse_loss, batches, engine="per_pass_graph")
    parts = [dense(model, *batch, loss_fn=F.mse_loss) for batch in batches]
    torch.testing.assert_close(columns(op), sum(parts) / 2, rtol=0, atol=1e-12)
    records = [one for one in caplog.records if "counted as samples" in one.getMessage()]
    assert len(records) == 1
    caplog.clear()
    right = HessianOperator(model, F.mse_loss, batches, weight=lambda b: b[1][..., 0].numel())
    expected = (56 * parts[0] + 60 * parts[1]) / 116
    torch.testing.assert_close(columns(right), expected, rtol=0, atol=1e-12)
    assert not [one for one in caplog.records if "counted as samples" in one.getMessage()]
