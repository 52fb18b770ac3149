"""The Hessian operator against dense Hessians: batches, weights, subsets, eigenpairs, errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature.networks import MODELS, Partial, columns, dense, make
from eigenfilter.curvature import GGNOperator, HessianOperator, eigsh


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_agrees_with_a_dense_hessian(name: str, dtype: torch.dtype, rtol: float) -> None:
    model, x, target = make(name, dtype)
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine="cached_graph")
    expected = dense(model.double(), x.double() if x.is_floating_point() else x, target)
    model.to(dtype)
    result = columns(op)
    assert op.shape == expected.shape
    assert op.dtype == result.dtype == dtype
    assert op.device == result.device == x.device
    assert op.engine == "cached_graph"
    scale = float(expected.abs().max())
    assert scale > 0.05
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=rtol * scale)
    v = torch.randn(op.shape[0], dtype=dtype)
    torch.testing.assert_close(op.matvec(v), result @ v, rtol=0, atol=20 * rtol * scale)


def test_parameters_without_influence_have_zero_rows() -> None:
    model, x, target = make("partial")
    assert isinstance(model, Partial)
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    counted = [p for p in model.parameters() if p.requires_grad]
    assert [p.shape for p in op.params] == [p.shape for p in counted]
    before = sum(p.numel() for p in model.first.parameters())
    rows = columns(op)[before : before + 6]
    assert not rows.any()
    assert columns(op)[:before].any()


@pytest.mark.parametrize("name", ["mlp", "partial"])
def test_uneven_batches_weigh_by_their_samples(name: str) -> None:
    model, x, target = make(name)
    x[38:] *= 9  # the small batch is unlike the large one
    batches = [(x[:38], target[:38]), [x[38:], target[38:]]]
    op = HessianOperator(model, nn.CrossEntropyLoss(), batches)
    expected = dense(model, x, target)
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-13)
    even = (dense(model, x[:38], target[:38]) + dense(model, x[38:], target[38:])) / 2
    assert (even - expected).abs().max() > 1e-2


def test_weight_overrides_the_number_of_samples() -> None:
    model, x, target = make()
    batches = [(x[:30], target[:30]), (x[30:], target[30:])]
    op = HessianOperator(
        model,
        nn.CrossEntropyLoss(),
        batches,
        weight=lambda batch: 3.0 if len(batch[0]) == 10 else 1,
    )
    expected = (dense(model, x[:30], target[:30]) + 3 * dense(model, x[30:], target[30:])) / 4
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-13)


def test_sum_adds_the_batches() -> None:
    model, x, target = make()
    batches = [(x[:30], target[:30]), (x[30:], target[30:])]
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    op = HessianOperator(model, loss_fn, batches, reduction="sum")
    expected = len(x) * dense(model, x, target)
    torch.testing.assert_close(columns(op), expected, rtol=1e-11, atol=1e-12)


def test_forward_reads_other_batches() -> None:
    model, x, target = make()
    batches = [{"x": x[:30], "y": target[:30]}, {"x": x[30:], "y": target[30:]}]

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        return {"logits": model(batch["x"])}, batch["y"]

    def loss_fn(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output["logits"], target)

    op = HessianOperator(
        model, loss_fn, batches, forward=forward, weight=lambda batch: len(batch["x"])
    )
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-13)
    op = HessianOperator(model, loss_fn, batches, forward=forward)
    with pytest.raises(ValueError, match="number of samples is unknown"):
        columns(op)
    one = HessianOperator(model, loss_fn, {"x": x, "y": target}, forward=forward)
    torch.testing.assert_close(columns(one), dense(model, x, target), rtol=0, atol=1e-13)


def test_a_subset_of_parameters_gives_a_block() -> None:
    model, x, target = make()
    assert isinstance(model, nn.Sequential)
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), params=model[3].parameters())
    expected = dense(model, x, target)[-15:, -15:]
    assert op.shape == (15, 15)
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-13)


def test_parameters_of_the_loss_count() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output * self.scale, target)

    model, x, target = make()
    loss_fn = Scaled()
    op = HessianOperator(model, loss_fn, (x, target))
    n = op.shape[0]
    result = columns(op)
    assert n == sum(p.numel() for p in model.parameters()) + 1
    assert result[-1, -1] > 1e-3
    torch.testing.assert_close(result, result.T, rtol=0, atol=1e-14)
    loss_fn.scale.data.fill_(1.0)
    block = columns(op)[:-1, :-1]
    torch.testing.assert_close(block, dense(model, x, target), rtol=0, atol=1e-13)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_eigenpairs_of_a_network(which: str, dtype: torch.dtype, tol: float) -> None:
    model, x, target = make("partial", dtype)
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    result = eigsh(op, 5, which, tol=tol)
    matrix = dense(model.double(), x.double(), target)
    rising = torch.linalg.eigvalsh(matrix)
    expected = {
        "LA": rising.flip(0)[:5],
        "SA": rising[:5],
        "LM": rising[rising.abs().argsort(descending=True)][:5],
        "BE": torch.cat([rising[:2], rising[-3:]]),
    }[which]
    scale = float(rising.abs().max())
    vectors = result.vectors.double()
    measured = (matrix @ vectors - vectors * result.values).norm(dim=0)
    floor = 50 * torch.finfo(dtype).eps * scale
    assert result.converged.all()
    assert (measured - result.residuals).abs().max() <= floor
    torch.testing.assert_close(result.values.double(), expected, rtol=tol, atol=floor)


def test_scipy_finds_the_same() -> None:
    sparse = pytest.importorskip("scipy.sparse.linalg")
    model, x, target = make("conv")
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    linear = op.to_scipy()
    values, vectors = sparse.eigsh(linear, k=4, which="LA", tol=1e-10)
    result = eigsh(op, 4, tol=1e-10)
    assert linear.dtype == "float64"
    assert linear.shape == op.shape
    torch.testing.assert_close(
        torch.from_numpy(values).flip(0), result.values, rtol=1e-8, atol=1e-12
    )
    overlap = (torch.from_numpy(vectors.copy()).flip(1) * result.vectors).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_loss_must_be_one_number() -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(reduction="none"), (x, target))
    with pytest.raises(ValueError, match=r"one element, not \[40\]"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    v = torch.ones(op.shape[0], dtype=torch.float64)
    wrong: dict[str, Any] = {
        "float": 1.0,
        "NoneType": None,
        "tuple": (x.sum(), x),
        r"\[3\]": x[0, :3],
    }
    for said, value in wrong.items():
        for kind in (HessianOperator, GGNOperator):
            op = kind(model, lambda output, target, value=value: value, (x, target))
            with pytest.raises(ValueError, match=f"one element, not {said}: reduce it"):
                op.matvec(v)


def test_two_pairs_in_a_tuple_are_an_input_and_a_target() -> None:
    """They may be meant; if the model rejects them, the error explains how they were read."""
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), ((x, target), (x, target)))
    with pytest.raises(TypeError) as raised:
        op.matvec(torch.ones(39, dtype=torch.float64))
    assert "pass list(data)" in raised.value.__notes__[0]


def test_a_parameter_that_is_frozen_later() -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    model.get_parameter("0.weight").requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad any more"):
        op.matvec(torch.ones(39, dtype=torch.float64))


def test_batches_of_a_loader_are_checked() -> None:
    model, x, target = make()
    v = torch.ones(39, dtype=torch.float64)
    samples = [{"x": a, "y": b} for a, b in zip(x, target, strict=True)]
    op = HessianOperator(model, nn.CrossEntropyLoss(), DataLoader(samples, batch_size=8))
    with pytest.raises(ValueError, match=r"forward=lambda model, batch:"):
        op.matvec(v)
    op = HessianOperator(model, nn.CrossEntropyLoss(), DataLoader(list(x), batch_size=8))
    with pytest.raises(ValueError, match=r"got a batch of type Tensor"):
        op.matvec(v)


def arguments() -> Iterator[tuple[dict[str, Any], str]]:
    model, x, target = make()
    first = next(model.parameters())
    mixed = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3).double())
    frozen = copy.deepcopy(model).requires_grad_(False)
    split = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, device="meta")).double()
    complex_ = nn.Linear(5, 3, dtype=torch.complex64)
    yield (
        {"engine": "magic"},
        r"engine must be 'auto' or one of \['cached_graph', .*\], not 'magic'",
    )
    yield {"mode": "test"}, "mode must be 'eval' or 'train'"
    yield {"autocast": torch.int8}, "autocast must be a floating dtype"
    yield {"memory_budget": -1}, "memory_budget must be a number of bytes"
    yield {"reduction": "none"}, "reduction must be 'mean' or 'sum'"
    yield {"reduction": "sum", "weight": len}, "weight has no meaning"
    yield {"params": []}, "no parameter requires grad"
    yield {"params": [first, first]}, "lists a parameter twice"
    yield {"params": ["0.*", first]}, "must be parameters, .* not Parameter, str"
    yield {"params": "3.w"}, r"name matches '3\.w', of 4 such as 0\.weight, 0\.bias, 3\.weight"
    yield {"params": copy.deepcopy(model).parameters()}, "not a parameter of the model"
    yield {"model": mixed}, r"float32 on cpu, torch\.float64 on cpu"
    yield {"model": complex_}, "real and floating"
    yield {"data": []}, "at least one batch"
    yield {"data": [x, target]}, "got a batch of type Tensor"
    yield {"data": (x, target, target)}, "got a batch of type tuple"
    yield {"data": x}, "got a batch of type Tensor"
    pair = (x, target)
    samples = TensorDataset(x, target)
    yield {"data": ([x], [target], [x])}, "got a batch of type tuple"
    yield {"data": (pair,)}, r"several batches go in a list, list\(data\)"
    yield {"data": (pair, pair, pair)}, r"several batches go in a list, list\(data\)"
    yield {"data": samples}, r"samples, not batches: pass torch\.utils\.data\.DataLoader"
    yield {"data": iter([pair])}, r"read once.*pass list\(data\)"
    yield {"data": (batch for batch in [pair])}, r"generator can be read once"
    yield {"data": zip([x], [target], strict=True)}, r"zip can be read once"
    yield {"data": {"input_ids": x, "labels": target}}, r"forward=lambda model, batch:"
    yield {"data": [{"input_ids": x, "labels": target}]}, r"forward=lambda model, batch:"
    yield {"data": None}, "got a batch of type NoneType"
    yield {"data": (x[:0], target[:0])}, "holds no samples"
    yield {"data": [pair, (x[:0], target[:0])]}, "holds no samples"
    yield {"data": (x.to("meta"), target)}, "data on the meta device hold no numbers"
    yield {"data": DataLoader(TensorDataset(x[:0], target[:0]))}, "gives no batch"
    yield {"model": copy.deepcopy(model).to("meta")}, r"meta device hold no numbers.*to_empty"
    yield {"model": split}, r"cpu, torch\.float64 on meta: pass.*model\.to\(device\)"
    yield {"model": copy.deepcopy(model).requires_grad_(False)}, r"p\.requires_grad_\(\)"
    yield {"params": frozen.parameters(), "model": frozen}, r"requires grad, of 4: call"
    yield {"params": first}, r"pass \[p\] for one"
    yield {"params": model.named_parameters()}, r"as model\.parameters\(\) gives, not tuple"
    yield {"model": model.forward}, "model must be a torch.nn.Module, not method"


@pytest.mark.parametrize(("changed", "message"), list(arguments()))
def test_arguments_out_of_range(changed: dict[str, Any], message: str) -> None:
    model, x, target = make()
    given = {"model": model, "loss_fn": nn.CrossEntropyLoss(), "data": (x, target), **changed}
    with pytest.raises(ValueError, match=message):
        HessianOperator(**given)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_must_not_be_negative(weight: float) -> None:
    model, x, target = make()
    batches = [(x[:30], target[:30]), (x[30:], target[30:])]
    op = HessianOperator(model, nn.CrossEntropyLoss(), batches, weight=lambda batch: weight)
    with pytest.raises(ValueError, match="weights must be at least 0 and finite"):
        columns(op)


@pytest.mark.parametrize(
    "v",
    [
        torch.ones(38, dtype=torch.float64),
        torch.ones(39),
        torch.ones(39, 1, dtype=torch.float64),
        torch.ones(39, dtype=torch.float64, device="meta"),
    ],
)
def test_vectors_must_fit(v: Tensor) -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    with pytest.raises(ValueError, match=r"v must be \[39\], torch.float64, on cpu"):
        op.matvec(v)


@pytest.mark.parametrize("shape", [(39,), (39, 0), (39, 2, 1)])
def test_matrices_must_fit(shape: tuple[int, ...]) -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    with pytest.raises(ValueError, match="V must be"):
        op.matmat(torch.ones(shape, dtype=torch.float64))
