"""Evaluation and training mode, replayed dropout masks, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from curvature.networks import OPERATORS, Partial, columns, dense, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow

WHOLE = [name for name in NAMES if name != "microbatched"]


@pytest.mark.parametrize("engine", [*WHOLE, "auto"])
@pytest.mark.parametrize("name", ["conv_norm", "partial"])
@pytest.mark.parametrize("kind", rest_slow(OPERATORS))
def test_training_mode(kind: type[CurvatureOperator], name: str, engine: str) -> None:
    """Batch statistics are differentiated through, and dropout masks stay the same."""
    model, x, target = make(name)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    expected = OPERATORS[kind](model, x, target, mode="train")
    assert (OPERATORS[kind](model, x, target) - expected).abs().max() > 1e-2
    op = kind(model, nn.CrossEntropyLoss(), (x, target), mode="train", engine=engine)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    result = columns(op)
    atol = 3e-8 if engine == "finite_difference" else 1e-12
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=0, atol=atol * scale)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)


class Counting(nn.Module):
    """Changes a buffer in place and replaces another in every forward pass in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.last = x.detach().mean(0)
        return x * self.seen


@pytest.mark.parametrize("engine", [*WHOLE, "auto"])
@pytest.mark.parametrize("kind", rest_slow(OPERATORS))
def test_buffers_are_left_as_they_were(kind: type[CurvatureOperator], engine: str) -> None:
    """Each forward pass starts from the same buffers, whatever writes to them."""
    linear = nn.Linear(8, 4)
    # Without a forward derivative; and what it writes is a function of x that autograd leaves out.
    plain = engine in ("forward_over_reverse", "finite_difference")
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 2, 2),
        nn.InstanceNorm1d(2, eps=0.5, affine=True, track_running_stats=True),
        nn.Flatten(),
        linear if plain else spectral_norm(linear),
        nn.Tanh(),
        Counting(),
        nn.Linear(4, 3),
    ).double()
    _, x, target = make()
    expected = OPERATORS[kind](model, x, target, mode="train")
    state = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    op = kind(model, nn.CrossEntropyLoss(), (x, target), mode="train", engine=engine)
    atol = float(expected.abs().max()) * (1e-7 if engine == "finite_difference" else 1e-12)
    with op.fixed():
        for _ in range(2):
            torch.testing.assert_close(columns(op), expected, rtol=0, atol=atol)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert model[6].last is None
    assert all(b is buffers[name] for name, b in model.named_buffers())


def test_batches_have_masks_of_their_own() -> None:
    model, x, target = make()
    half = (x[:20], target[:20])
    op = HessianOperator(model, nn.CrossEntropyLoss(), [half, half], mode="train", seed=0)
    expected = dense(model, *half, mode="train")
    assert (columns(op) - expected).abs().max() > 1e-3
    other = HessianOperator(model, nn.CrossEntropyLoss(), half, mode="train", seed=1)
    both = (columns(other) + expected) / 2
    torch.testing.assert_close(columns(op), both, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["conv_norm", "mlp"])
def test_coupled_samples_cannot_be_split(name: str) -> None:
    model, x, target = make(name)
    op = HessianOperator(
        model,
        nn.CrossEntropyLoss(),
        (x, target),
        mode="train",
        engine="microbatched",
        memory_budget=5_000,
    )
    with pytest.raises(ValueError, match=r"samples are coupled.*choose another engine"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_modes_are_put_back_after_an_error(mode: str, training: bool) -> None:
    model, x, target = make("partial")
    assert isinstance(model, Partial)
    model.train(training)
    model.drop.train(not training)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        assert model.norm.training == (mode == "train")
        raise KeyError("interrupted")

    op = HessianOperator(model, loss_fn, (x, target), mode=mode)
    with pytest.raises(KeyError, match="interrupted"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    assert model.training is training
    assert model.norm.training is training
    assert model.drop.training is not training
    assert model.norm.track_running_stats


@pytest.mark.parametrize(
    "engine", ["cached_graph", "per_pass_graph", "vmap", "forward_over_reverse"]
)
@pytest.mark.parametrize("kind", OPERATORS)
def test_autocast(kind: type[CurvatureOperator], engine: str) -> None:
    """Products in bfloat16 agree with float32 to its 8 bits; vectors stay float32."""
    model, x, target = make(dtype=torch.float32)
    dtypes: list[torch.dtype] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        dtypes.append(output.dtype)
        return nn.functional.cross_entropy(output, target)

    op = kind(model, loss_fn, (x, target), engine=engine, autocast=torch.bfloat16)
    result = columns(op)
    exact = OPERATORS[kind](model.double(), x.double(), target)
    model.float()
    error = (result.double() - exact).norm() / exact.norm()
    assert set(dtypes) == {torch.bfloat16}
    assert result.dtype == torch.float32
    assert 1e-4 < error < 4 * 2.0**-8


def test_autocast_around_a_moving_model() -> None:
    """Weights that autocast converted before a change must not be used after it."""
    model, x, target = make(dtype=torch.float32)
    op = HessianOperator(
        model, nn.CrossEntropyLoss(), (x, target), engine="finite_difference", autocast=torch.half
    )
    v = torch.randn(op.shape[0])
    alone = op.matvec(v)
    with torch.autocast("cpu", dtype=torch.half):
        model(x)
        assert torch.equal(op.matvec(v), alone)
    expected = dense(model, x, target) @ v
    assert (alone - expected).norm() < 0.1 * expected.norm()
