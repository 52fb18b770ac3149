"""Batches of a loader: weights by samples, the same order in each pass, or an error."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from curvature.networks import OPERATORS, columns, dense, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator, eigsh
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow

ENGINES = ["cached_graph", "per_pass_graph", "microbatched"]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Inputs with new noise from torch's generator, or from Python's, each time."""

    def __init__(self, x: Tensor, target: Tensor, generator: str) -> None:
        self.x, self.target, self.generator = x, target, generator

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(()) if self.generator == "torch" else torch.tensor(random.random())
        return self.x[index] + noise, self.target[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Single samples, a given number in each pass."""

    def __init__(self, x: Tensor, target: Tensor, counts: list[int]) -> None:
        self.x, self.target, self.counts = x, target, iter(counts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = next(self.counts)
        return zip(self.x[:count], self.target[:count], strict=True)


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("kind", rest_slow(OPERATORS))
def test_a_loader_with_a_small_last_batch(kind: type[CurvatureOperator], engine: str) -> None:
    """1,900 and 100 samples: the mean of the two batches' matrices would be far off."""
    first = 1900 if kind is HessianOperator else 95  # the others' dense matrices take long
    count = first + first // 19
    model = make()[0]
    x = torch.randn(count, 5, dtype=torch.float64)
    x[first:] *= 5
    target = torch.randint(3, (count,))
    op = kind(
        model,
        nn.CrossEntropyLoss(),
        DataLoader(TensorDataset(x, target), batch_size=first),
        engine=engine,
        memory_budget=150 * count if engine == "microbatched" else None,
    )
    whole, *parts = (
        OPERATORS[kind](model, x[part], target[part])
        for part in (slice(None), slice(first), slice(first, None))
    )
    atol = 1e-7 if engine == "finite_difference" else 1e-12
    torch.testing.assert_close(columns(op), whole, rtol=0, atol=atol)
    assert (sum(parts) / 2 - whole).abs().max() > 1e-2
    assert (sum(parts) - whole).abs().max() > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_shuffled_loader_is_replayed(engine: str) -> None:
    """Each pass has the same order, also with drop_last; the global generator is restored."""
    model, x, target = make()
    data = DataLoader(TensorDataset(x, target), batch_size=9, shuffle=True, drop_last=True)
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine=engine, memory_budget=20_000)
    before = torch.get_rng_state()
    result = columns(op)
    eigsh(op, 3)
    torch.manual_seed(123)
    assert torch.equal(columns(op), result)
    torch.set_rng_state(before)
    columns(op)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        samples = torch.cat([batch[0] for batch in data])
        torch.manual_seed(0)
        labels = torch.cat([batch[1] for batch in data])
    assert len(samples) == 36
    torch.testing.assert_close(result, dense(model, samples, labels), rtol=0, atol=1e-13)


def test_another_seed_is_another_order() -> None:
    model, x, target = make()
    data = DataLoader(TensorDataset(x, target), batch_size=9, shuffle=True, drop_last=True)
    first, second = (
        columns(HessianOperator(model, nn.CrossEntropyLoss(), data, seed=seed)) for seed in (0, 1)
    )
    assert (first - second).abs().max() > 1e-4


def test_augmentation_by_torchs_generator_is_replayed() -> None:
    model, x, target = make()
    data = DataLoader(Noisy(x, target, "torch"), batch_size=15)
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="per_pass_graph")
    assert torch.equal(columns(op), columns(op))


@pytest.mark.parametrize("engine", ["per_pass_graph", "microbatched", "forward_over_reverse"])
def test_a_loader_with_its_own_order_raises(engine: str) -> None:
    model, x, target = make()
    data = DataLoader(
        TensorDataset(x, target), batch_size=9, shuffle=True, generator=torch.Generator()
    )
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine=engine)
    with pytest.raises(RuntimeError, match=r"other batches in a second pass.*shuffle=False"):
        eigsh(op, 3)


def test_a_loader_with_its_own_order_is_read_once_where_graphs_are_kept() -> None:
    model, x, target = make()
    data = DataLoader(
        TensorDataset(x, target), batch_size=9, shuffle=True, generator=torch.Generator()
    )
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="cached_graph")
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-13)
    partly = HessianOperator(
        model, nn.CrossEntropyLoss(), data, engine="cached_graph", memory_budget=5_000
    )
    columns(partly)
    with pytest.raises(RuntimeError, match="other batches in a second pass"):
        columns(partly)


def test_graphs_are_kept_as_far_as_the_budget_goes() -> None:
    model, x, target = make()
    calls = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(output, target)

    data = DataLoader(TensorDataset(x, target), batch_size=8)
    counts = []
    for budget in (0, 5_000, 80_000):
        op = HessianOperator(model, loss_fn, data, engine="cached_graph", memory_budget=budget)
        expected = columns(op)
        calls = 0
        assert torch.equal(columns(op), expected)
        counts.append(calls)
    assert counts[0] == 5
    assert 0 < counts[1] < 5
    assert counts[2] == 0


def test_augmentation_by_another_generator_raises() -> None:
    model, x, target = make()
    data = DataLoader(Noisy(x, target, "python"), batch_size=15)
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="per_pass_graph")
    columns(op)
    with pytest.raises(RuntimeError, match="switch off random augmentation"):
        columns(op)
    # At another point another draw is as good.
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    assert columns(op).abs().max() > 1e-2


@pytest.mark.parametrize("counts", [[40, 36], [36, 40], [40, 37]])
def test_a_pass_of_another_length_raises(counts: list[int]) -> None:
    model, x, target = make()
    data = DataLoader(Stream(x, target, counts), batch_size=4)
    op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="per_pass_graph")
    expected = dense(model, x[: counts[0]], target[: counts[0]])
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match="other batches in a second pass"):
        columns(op)


def test_a_loader_of_unknown_length() -> None:
    model, x, target = make()
    data = DataLoader(Stream(x, target, [40] * 9), batch_size=15)
    op = HessianOperator(model, nn.CrossEntropyLoss(), data)
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-13)


def test_loaders_that_give_no_pairs() -> None:
    model, x, target = make()
    v = torch.ones(39, dtype=torch.float64)
    for data, error, message in (
        (DataLoader(x), ValueError, "a DataLoader of them.*a batch of type Tensor"),
        (DataLoader(Stream(x, target, [0, 0])), RuntimeError, "the loader gave no batch"),
    ):
        op = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="cached_graph")
        with pytest.raises(error, match=message):
            op.matvec(v)


def test_batches_that_cannot_be_split() -> None:
    model, x, target = make()
    op = HessianOperator(
        model,
        nn.CrossEntropyLoss(),
        {"x": x, "y": target, "extra": torch.ones(3)},
        forward=lambda model, batch: (model(batch["x"]), batch["y"]),
        engine="microbatched",
    )
    with pytest.raises(ValueError, match="do not share a leading dimension"):
        columns(op)


def test_data_in_other_forms_raise_with_a_remedy() -> None:
    model, x, target = make()
    loss = nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match=r"pass a batch as the tuple \(x, y\)"):
        HessianOperator(model, loss, x, target)
    with pytest.raises(ValueError, match=r"torch\.as_tensor"):
        HessianOperator(model, loss, (x.numpy(), target))
    for data in ((x, x, target), [(x, x, x, target)]):
        with pytest.raises(ValueError, match=r"got a batch of type tuple of \d.*forward="):
            HessianOperator(model, loss, data)
    with torch.inference_mode():
        inference_tensor = x.clone()
    for batch in ((inference_tensor, target), (x, {"y": inference_tensor})):
        with pytest.raises(ValueError, match=r"inference_mode.*clone\(\)"):
            HessianOperator(model, loss, batch)
    op = HessianOperator(model, loss, (inference_tensor.clone(), target))
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-12)


def test_an_operator_in_inference_mode_raises_and_keeps_its_engine() -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    v = torch.ones(39, dtype=torch.float64)
    with torch.inference_mode():
        for call in (lambda: op.matvec(v), op.gradient):
            with pytest.raises(RuntimeError, match="outside it"):
                call()
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-12)
    assert op.engine != "finite_difference"
