"""Every engine on every operator and network, against matrices built densely."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.networks import MODELS, OPERATORS, columns, dense, dense_fisher, dense_ggn, make
from eigenfilter.curvature import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    eigsh,
)
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow

# Relative to the largest element. A difference with the step 6e-6 (1 + ||x||) leaves the square of
# that times the third derivative's share, and the rounding of gradients over it.
ROUNDING = dict.fromkeys(NAMES, 1e-12) | {"finite_difference": 3e-8}
SMALL = 8_000  # bytes: less than a graph of these networks, at least that of a sample


def budget(engine: str, name: str = "mlp") -> int | None:
    small = 20 * SMALL if name == "transformer" else SMALL
    return small if engine == "microbatched" else None


def assert_close(result: Tensor, expected: Tensor, engine: str) -> None:
    scale = float(expected.abs().max())
    assert scale > 0.02
    torch.testing.assert_close(result, expected, rtol=0, atol=ROUNDING[engine] * scale)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("name", rest_slow(MODELS, "mlp", "partial"))
@pytest.mark.parametrize("kind", OPERATORS)
def test_blocks_and_vectors(kind: type[CurvatureOperator], name: str, engine: str) -> None:
    model, x, target = make(name)
    expected = OPERATORS[kind](model, x, target)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    op = kind(
        model, nn.CrossEntropyLoss(), (x, target), engine=engine, memory_budget=budget(engine, name)
    )
    result = columns(op)
    assert_close(result, expected, engine)
    v = torch.randn(op.shape[0], dtype=torch.float64, requires_grad=True)
    product = op.matvec(v)
    assert_close(product, expected @ v.detach(), engine)
    assert not product.requires_grad
    assert op.engine == engine
    assert (op.error is not None) == (engine == "finite_difference")
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("kind", OPERATORS)
def test_uneven_batches_of_a_subset_of_the_parameters(
    kind: type[CurvatureOperator], engine: str
) -> None:
    """Batches that differ from each other, on the tied layer and the last one."""
    model, x, target = make("partial")
    x[38:] *= 9
    names = ["tied.weight", "tied.bias", "last.weight"]
    expected = OPERATORS[kind](model, x, target, names)
    op = kind(
        model,
        nn.CrossEntropyLoss(),
        [(x[:38], target[:38]), (x[38:], target[38:])],
        params=[model.get_parameter(name) for name in names],
        engine=engine,
        memory_budget=budget(engine),
    )
    assert op.shape == (16 + 4 + 12,) * 2
    assert_close(columns(op), expected, engine)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("kind", OPERATORS)
def test_sums(kind: type[CurvatureOperator], engine: str) -> None:
    """Sums over the samples of a batch and over batches, without a mean."""
    model, x, target = make()
    op = kind(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        [(x[:30], target[:30]), (x[30:], target[30:])],
        engine=engine,
        reduction="sum",
        memory_budget=budget(engine),
    )
    assert_close(columns(op), len(x) * OPERATORS[kind](model, x, target), engine)


def test_checkpointing_splits_batches() -> None:
    model, x, target = make()
    samples: list[int] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        samples.append(len(output))
        return nn.functional.cross_entropy(output, target)

    op = HessianOperator(model, loss_fn, (x, target), engine="microbatched", memory_budget=SMALL)
    columns(op)
    samples.clear()
    columns(op)
    assert len(samples) > 1
    assert sum(samples) == len(x)


@pytest.mark.parametrize("kind", OPERATORS)
def test_other_losses(kind: type[CurvatureOperator]) -> None:
    """H_L of a loss that is neither diagonal in the output nor convex."""

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return (torch.sin(output.sum(1)) * output.norm(dim=1) + target).square().mean()

    model, x, target = make()
    op = kind(model, loss_fn, (x, target))
    assert_close(columns(op), OPERATORS[kind](model, x, target, loss_fn=loss_fn), "cached_graph")


def test_the_ggn_of_the_square_loss_on_outputs_of_any_shape() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.conv(x))

    model, x = Images(), torch.randn(6, 1, 4, 4, dtype=torch.float64)
    target = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    op = GGNOperator(model, nn.MSELoss(), (x, target))
    expected = dense_ggn(model, x, target, loss_fn=nn.functional.mse_loss)
    assert_close(columns(op), expected, "cached_graph")
    hessian = dense(model, x, target, loss_fn=nn.functional.mse_loss)
    assert (hessian - expected).abs().max() > 1e-2


def test_the_ggn_of_a_linear_model_is_its_hessian() -> None:
    model, x, target = nn.Linear(5, 3).double(), *make()[1:]
    op = GGNOperator(model, nn.CrossEntropyLoss(), (x, target))
    assert_close(columns(op), dense(model, x, target), "cached_graph")


def test_losses_of_samples_as_given() -> None:
    model, x, target = make()
    expected = dense_fisher(model, x, target)
    op = EmpiricalFisherOperator(model, nn.CrossEntropyLoss(reduction="none"), (x, target))
    assert_close(columns(op), expected, "cached_graph")
    squares = EmpiricalFisherOperator(
        model, lambda output, _: output.square().mean(1).mean(), (x, None)
    )
    expected = dense_fisher(model, x, target, loss_fn=lambda output, _: output.square().mean())
    assert_close(columns(squares), expected, "cached_graph")


def test_gauss_newton_and_fisher_are_semidefinite() -> None:
    model, x, target = make("partial")
    for kind in (GGNOperator, EmpiricalFisherOperator):
        result = eigsh(kind(model, nn.CrossEntropyLoss(), (x, target)), 2, "SA")
        assert result.values.abs().max() < 1e-12
    lowest = eigsh(HessianOperator(model, nn.CrossEntropyLoss(), (x, target)), 1, "SA")
    assert lowest.values[0] < -1e-3


def test_parameters_of_the_loss_have_no_gauss_newton_matrix() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output * self.scale, target)

    model, x, target = make()
    loss_fn = Scaled()
    op = GGNOperator(model, loss_fn, (x, target))
    expected = dense_ggn(
        model, x, target, loss_fn=lambda z, t: nn.functional.cross_entropy(0.7 * z, t)
    )
    assert_close(columns(op), expected, "cached_graph")
    with pytest.raises(ValueError, match="a parameter of the operator is not a parameter"):
        GGNOperator(model, loss_fn, (x, target), params=[loss_fn.scale])
    fisher = columns(EmpiricalFisherOperator(model, loss_fn, (x, target)))
    assert fisher[-1, -1] > 1e-4


def test_outputs_that_do_not_fit() -> None:
    model, x, target = make()

    def forward(model: nn.Module, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        return {"logits": model(batch[0])}, batch[1]

    v = torch.ones(39, dtype=torch.float64)
    for kind in (GGNOperator, EmpiricalFisherOperator):
        op = kind(model, nn.CrossEntropyLoss(), (x, target), forward=forward)
        with pytest.raises(ValueError, match=r"output must be a tensor.* is a dict: let forward"):
            op.matvec(v)
    pairs = EmpiricalFisherOperator(model, lambda output, _: output[:2, 0], (x, target))
    with pytest.raises(ValueError, match=r"one loss a sample.*; got \[2\] for \[40, 3\]"):
        pairs.matvec(v)
    single = EmpiricalFisherOperator(model, lambda output, _: 1.0, (x, target))
    with pytest.raises(ValueError, match="got float"):
        single.matvec(v)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("engine", ["cached_graph", "vmap", "forward_over_reverse"])
def test_blocks_of_any_layout(engine: str, layout: str) -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    V = torch.randn(39, 3, dtype=torch.float64)
    block = {
        "rows": V,
        "columns": V.T.contiguous().T,
        "strided": torch.stack([V, V], 2)[..., 1],
    }[layout]
    before = block.clone()
    assert_close(op.matmat(block), dense(model, x, target) @ V, engine)
    assert torch.equal(block, before)


def test_scipy_asks_for_blocks() -> None:
    pytest.importorskip("scipy")
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine="vmap")
    V = torch.randn(39, 4, dtype=torch.float64)
    result = torch.from_numpy(op.to_scipy() @ V.numpy())
    assert_close(result, dense(model, x, target) @ V, "vmap")


class Hook:
    """A hook that does not change gradients."""

    def __call__(self, *_: Any) -> None:
        return None


@pytest.mark.parametrize("engine", ["per_pass_graph", "microbatched", "forward_over_reverse"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_one_graph_at_a_time(kind: type[CurvatureOperator], engine: str) -> None:
    """The graph of a batch is freed before the next one is built."""
    model, x, target = make()
    hooks: list[weakref.ref[Hook]] = []  # each held by the graph it is in
    alive = []

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        output = model(batch[0])
        alive.append(sum(ref() is not None for ref in hooks))
        if output.grad_fn is not None:
            hook = Hook()
            output.grad_fn.register_hook(hook)
            hooks.append(weakref.ref(hook))
        return output, batch[1]

    batches = [(x[i : i + 8], target[i : i + 8]) for i in range(0, 40, 8)]
    op = kind(
        model,
        nn.CrossEntropyLoss(),
        batches,
        forward=forward,
        engine=engine,
        memory_budget=budget(engine),
    )
    op.matvec(torch.ones(39, dtype=torch.float64))
    alive.clear()
    op.matmat(torch.ones(39, 3, dtype=torch.float64))
    assert alive.count(0) >= 5  # at least once a batch
    assert hooks
    assert max(alive) == (engine == "forward_over_reverse" and kind is not HessianOperator)
