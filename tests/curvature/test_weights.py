"""Batches whose weights differ from what their loss averages over raise, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvature.losses import of_classes, split, summed, weighted
from curvature.networks import columns, dense, dense_ggn, make
from eigenfilter.curvature import CurvatureOperator, GGNOperator, HessianOperator, eigsh
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow

MEANS: list[type[CurvatureOperator]] = [HessianOperator, GGNOperator]


def ignoring(target: Tensor) -> Tensor:
    """Targets with more ignored ones in the last batches than in the first."""
    target = target.clone()
    target[[3, 17, 18, 21, 22, 25, 30, 31, 33, 38]] = -100
    return target


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
    """The loss of such a batch is NaN."""
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
    """Training code avoids NaN with such a constant."""

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        chosen = t != -100
        return F.cross_entropy(z[chosen], t[chosen]) if bool(chosen.any()) else torch.zeros(())

    model, x, target = make()
    target[20:32] = -100
    op = HessianOperator(model, loss_fn, split(x, target, 20, 12, 8), weight=valid)
    valid_rows = target != -100
    torch.testing.assert_close(columns(op), dense(model, x[valid_rows], target[valid_rows]))


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
@pytest.mark.parametrize("name", rest_slow(["mlp", "partial", "conv_norm"], "partial"))
@pytest.mark.parametrize("case", RIGHT)
def test_right_weights_do_not_raise(case: str, name: str, mode: str) -> None:
    """Nor do they with dropout and batch statistics, which couple samples."""
    options = dict(RIGHT[case])
    model, x, target = make(name)
    if options.pop("alike", False):
        target = torch.arange(40) % 20 % 3
    batches = split(x, target, *options.pop("sizes", (20, 14, 6)))
    loss_fn, weight = options.pop("loss_fn"), options.get("weight", lambda b: float(len(b[0])))
    for kind in MEANS:
        op = kind(model, loss_fn, batches, mode=mode, **options)
        if mode == "train":
            assert op.matvec(torch.ones(op.shape[0], dtype=op.dtype)).isfinite().all()
            continue
        matrix = dense if kind is HessianOperator else dense_ggn
        result = [matrix(model, *batch, loss_fn=loss_fn) for batch in batches]
        weights = [1.0 if options.get("reduction") else float(weight(b)) for b in batches]
        whole = sum(w * m for w, m in zip(weights, result, strict=True))
        whole = whole / (1.0 if options.get("reduction") else sum(weights))
        torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("engine", ["cached_graph", "per_pass_graph", "finite_difference"])
def test_a_loss_that_writes_to_its_arguments(engine: str) -> None:
    model, x, target = make()

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        return z.sub_(t[:, None]).square().mean()

    op = HessianOperator(model, loss_fn, split(x, target, 20, 14, 6), engine=engine)
    whole = dense(model, x, target, loss_fn=lambda z, t: (z - t[:, None]).square().mean())
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=1e-6)
