"""Batches whose weights differ from what their loss averages over raise, and no others."""

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
from torch.utils.data import DataLoader, TensorDataset

from curvature.networks import columns, dense, dense_ggn, make
from eigenfilter.curvature import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    eigsh,
)
from eigenfilter.curvature.engines import NAMES

MEANS: list[type[CurvatureOperator]] = [HessianOperator, GGNOperator]
CLASSES = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def split(x: Tensor, target: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), target.split(sizes), strict=True))


def ignoring(target: Tensor) -> Tensor:
    """Targets with more ignored ones in the last batches than in the first."""
    target = target.clone()
    target[[3, 17, 18, 21, 22, 25, 30, 31, 33, 38]] = -100
    return target


def weighted(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, weight=CLASSES)


def summed(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="sum")


def of_classes(batch: Any) -> Tensor:
    return CLASSES[batch[1]].sum()


def valid(batch: Any) -> Tensor:
    return (batch[1] != -100).sum()


CASES: dict[str, tuple[Any, Callable[[Tensor], Tensor], Any]] = {
    "ignored targets": (F.cross_entropy, ignoring, valid),
    "class weights": (weighted, lambda t: t, of_classes),
    "sum": (summed, lambda t: t, None),
    "sum over a constant": (lambda z, t: summed(z, t) / 64, lambda t: t, None),
    "sum and a penalty": (lambda z, t: summed(z, t) + 0.1, lambda t: t, None),
}


@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize("engine", ["auto", *NAMES])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_is_no_mean_over_samples_raises(
    kind: type[CurvatureOperator], engine: str, case: str
) -> None:
    loss_fn, change, _ = CASES[case]
    model, x, target = make()
    op = kind(model, loss_fn, split(x, change(target), 20, 14, 6), engine=engine)
    with pytest.raises(ValueError, match=r"loss_fn.*weight=.*reduction='sum'"):
        op.matvec(torch.ones(39, dtype=torch.float64))


@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_the_remedies_give_the_matrix_of_all_data(
    kind: type[CurvatureOperator], mode: str, case: str
) -> None:
    loss_fn, change, weight = CASES[case]
    model, x, target = make()
    model[2] = nn.Identity()
    target = change(target)
    how = {"reduction": "sum"} if weight is None else {"weight": weight}
    op = kind(model, loss_fn, split(x, target, 20, 14, 6), mode=mode, **how)
    whole = (dense if kind is HessianOperator else dense_ggn)(model, x, target, loss_fn=loss_fn)
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-11)
    loader = DataLoader(TensorDataset(x, target), batch_size=13)
    op = kind(model, loss_fn, loader, mode=mode, **how)
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sizes", [(20, 20), (20, 14, 6), (1, 39), (39, 1), (1,) * 40])
def test_batches_of_one_sample_and_loaders_too(sizes: tuple[int, ...]) -> None:
    model, x, target = make()
    for data in (
        split(x, ignoring(target), *sizes),
        DataLoader(TensorDataset(x, ignoring(target)), batch_size=sizes[0]),
    ):
        op = HessianOperator(model, F.cross_entropy, data, engine="per_pass_graph")
        with pytest.raises(ValueError, match="weight="):
            eigsh(op, 2)
    op = HessianOperator(model, F.cross_entropy, split(x, target, *sizes), engine="per_pass_graph")
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["cached_graph", "microbatched", "auto", "forward_over_reverse"])
@pytest.mark.parametrize("case", CASES)
def test_a_single_batch_needs_no_weight(engine: str, case: str) -> None:
    loss_fn, change, _ = CASES[case]
    model, x, target = make()
    target = change(target)
    op = HessianOperator(model, loss_fn, [(x, target)], engine=engine, memory_budget=10**7)
    whole = dense(model, x, target, loss_fn=loss_fn)
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_a_loader_of_one_batch_needs_none_either(case: str) -> None:
    loss_fn, change, _ = CASES[case]
    model, x, target = make()
    target = change(target)
    data = DataLoader(TensorDataset(x, target), batch_size=64)
    for engine in ("cached_graph", "per_pass_graph", "finite_difference"):
        op = HessianOperator(model, loss_fn, data, engine=engine)
        whole = dense(model, x, target, loss_fn=loss_fn)
        torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-5)


def test_one_batch_too_large_for_its_graph_is_not_split_by_wrong_weights() -> None:
    model, x, target = make()
    target = ignoring(target)
    op = HessianOperator(model, F.cross_entropy, (x, target), memory_budget=2000)
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-11)
    assert op.engine == "forward_over_reverse"


@pytest.mark.parametrize("engine", ["auto", *NAMES])
@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize("first", [True, False])
def test_batches_of_weight_zero_are_left_out(
    kind: type[CurvatureOperator], engine: str, first: bool
) -> None:
    """Their loss is NaN."""
    model, x, target = make()
    target[:12] = -100
    batches = split(x, target, 12, 20, 8)
    batches = batches if first else batches[1:] + batches[:1]
    op = kind(model, F.cross_entropy, batches, weight=valid, engine=engine)
    whole = (dense if kind is HessianOperator else dense_ggn)(model, x[12:], target[12:])
    atol = 1e-6 if engine == "finite_difference" else 1e-12
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=atol)
    if isinstance(op, HessianOperator):
        assert op.gradient().isfinite().all()
    op = kind(model, F.cross_entropy, batches, engine=engine)
    with pytest.raises(ValueError, match="weight="):
        columns(op)


def test_a_constant_loss_on_an_empty_batch_is_left_out() -> None:
    """As in training code that avoids NaN."""

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        chosen = t != -100
        return F.cross_entropy(z[chosen], t[chosen]) if bool(chosen.any()) else torch.zeros(())

    model, x, target = make()
    target[20:32] = -100
    op = HessianOperator(model, loss_fn, split(x, target, 20, 12, 8), weight=valid)
    kept = target != -100
    torch.testing.assert_close(columns(op), dense(model, x[kept], target[kept]))


def test_batches_of_weight_zero_alone_raise() -> None:
    model, x, target = make()
    batches = split(x, torch.full_like(target, -100), 20, 20)
    op = HessianOperator(model, F.cross_entropy, batches, weight=valid)
    with pytest.raises(ValueError, match="all batches have weight 0"):
        op.matvec(torch.ones(39, dtype=torch.float64))


@pytest.mark.parametrize(
    "weight", [len, lambda batch: len(batch[0]), lambda batch: 2.0 * len(batch[0])]
)
def test_weights_that_count_something_else_raise(weight: Any) -> None:
    model, x, target = make()
    weight = (lambda batch: len(batch[0])) if weight is len else weight
    op = HessianOperator(
        model, F.cross_entropy, split(x, ignoring(target), 20, 14, 6), weight=weight
    )
    with pytest.raises(ValueError, match=r"a part of batch \d .*weight="):
        columns(op)


RIGHT: dict[str, dict[str, Any]] = {
    "mean": {"loss_fn": F.cross_entropy},
    "label smoothing": {"loss_fn": lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1)},
    "penalty": {"loss_fn": lambda z, t: F.cross_entropy(z, t) + 0.01 * z.square().mean()},
    "squares": {"loss_fn": lambda z, t: (z - t[:, None]).square().sum(1).mean()},
    "importance": {"loss_fn": F.cross_entropy, "weight": lambda b: 3.0 if len(b[0]) == 20 else 1.0},
    "plain mean": {"loss_fn": weighted, "weight": lambda batch: 1.0},
    "sum": {"loss_fn": summed, "reduction": "sum"},
    "twice the samples": {"loss_fn": F.cross_entropy, "weight": lambda b: 2.0 * len(b[0])},
    "fixed number of samples": {
        "loss_fn": lambda z, t: (torch.ones(20) * F.cross_entropy(z, t, reduction="none")).mean(),
        "sizes": (20, 20),
    },
    "coupled": {
        "loss_fn": lambda z, t: F.cross_entropy(z @ z.T, torch.arange(len(z))),
        "sizes": (20, 20),
    },
    "class weights, alike in all batches": {"loss_fn": weighted, "sizes": (20, 20), "alike": True},
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["mlp", "partial", "conv_norm"])
@pytest.mark.parametrize("case", RIGHT)
def test_right_weights_do_not_raise(case: str, name: str, mode: str) -> None:
    """Also with dropout and batch statistics, which couple samples."""
    chosen = dict(RIGHT[case])
    model, x, target = make(name)
    if chosen.pop("alike", False):
        target = torch.arange(40) % 20 % 3
    batches = split(x, target, *chosen.pop("sizes", (20, 14, 6)))
    loss_fn, weight = chosen.pop("loss_fn"), chosen.get("weight", lambda b: float(len(b[0])))
    for kind in MEANS:
        op = kind(model, loss_fn, batches, mode=mode, **chosen)
        if mode == "train":
            assert op.matvec(torch.ones(op.shape[0], dtype=op.dtype)).isfinite().all()
            continue
        matrix = dense if kind is HessianOperator else dense_ggn
        result = [matrix(model, *batch, loss_fn=loss_fn) for batch in batches]
        weights = [1.0 if chosen.get("reduction") else float(weight(b)) for b in batches]
        whole = sum(w * m for w, m in zip(weights, result, strict=True))
        whole = whole / (1.0 if chosen.get("reduction") else sum(weights))
        torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("engine", ["cached_graph", "per_pass_graph", "finite_difference"])
def test_a_loss_that_writes_to_its_arguments(engine: str) -> None:
    model, x, target = make()

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        return z.sub_(t[:, None]).square().mean()

    op = HessianOperator(model, loss_fn, split(x, target, 20, 14, 6), engine=engine)
    whole = dense(model, x, target, loss_fn=lambda z, t: (z - t[:, None]).square().mean())
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-6)


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
        given = {"forward": forward, "engine": "per_pass_graph"}
        op = HessianOperator(model, loss_fn, batches, weight=tokens, **given)
        x, y = (torch.cat([batch[key].flatten() for batch in batches]) for key in ("x", "y"))
        torch.testing.assert_close(columns(op), dense(model, x, y), rtol=0, atol=1e-12)
        wrong = HessianOperator(model, loss_fn, batches, weight=lambda b: len(b["x"]), **given)
        with pytest.raises(ValueError, match=r"is not their weighted mean.*weight="):
            columns(wrong)
        plain = HessianOperator(model, loss_fn, batches, weight=lambda batch: 1.0, **given)
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
    said = [one for one in caplog.records if "cannot be checked" in one.getMessage()]
    assert len(said) == 1
    assert said[0].levelname == "WARNING"


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
        given = {k: p.view(s) for k, p, s in zip(params, parts, shapes, strict=True)}
        a = x.detach().clone().requires_grad_()
        return loss_fn(functional_call(model.eval(), given, (a,)), (a, w))

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
    kept = target != -100

    def losses(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in model.parameters()])
        given = {
            name: part.view_as(p)
            for (name, p), part in zip(model.named_parameters(), parts, strict=True)
        }
        z = functional_call(model.eval(), given, (x[kept],))
        return F.cross_entropy(z, target[kept], reduction="none")

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
    said = [one for one in caplog.records if "counted as samples" in one.getMessage()]
    assert len(said) == 1
    caplog.clear()
    right = HessianOperator(model, F.mse_loss, batches, weight=lambda b: b[1][..., 0].numel())
    expected = (56 * parts[0] + 60 * parts[1]) / 116
    torch.testing.assert_close(columns(right), expected, rtol=0, atol=1e-12)
    assert not [one for one in caplog.records if "counted as samples" in one.getMessage()]
