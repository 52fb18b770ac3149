"""Batches of [time, samples, ...] with different numbers of samples have right weights or raise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.networks import columns
from curvature.networks import dense as dense_of
from eigenfilter.curvature import GGNOperator, HessianOperator
from marks import rest_slow

TIME, SAMPLES, WIDTH = 6, 9, 4


class Recurrent(nn.Module):
    """A recurrent layer at its defaults, time first, and a linear one."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(WIDTH, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x)[0])
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 5, dropout=0.0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x))
        return out


def tokens(z: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), target.flatten())


def last_step(z: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(z[-1], target)


def labeled_tokens(z: Tensor, target: dict[str, Any]) -> Tensor:
    return tokens(z, target["labels"]) * target["scale"]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "RNN": lambda: Recurrent(nn.RNN),
    "TransformerEncoder": Encoder,
}
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[int], Any]]] = {
    "mse": (F.mse_loss, lambda n: torch.randn(TIME, n, 2, dtype=torch.float64)),
    "tokens": (tokens, lambda n: torch.randint(2, (TIME, n))),
    "last step": (last_step, lambda n: torch.randint(2, (n,))),
    "named": (labeled_tokens, lambda n: {"labels": torch.randint(2, (TIME, n)), "scale": 0.5}),
}


def select_samples(target: Any, part: slice) -> Any:
    if isinstance(target, dict):
        return {**target, "labels": target["labels"][:, part]}
    return target[part] if target.ndim == 1 else target[:, part]


def problem(model: str, loss: str) -> tuple[nn.Module, Any, Any, list[Any]]:
    """Return the model, its loss, all data as one batch, and as two uneven batches."""
    torch.manual_seed(0)
    net = MODELS[model]().double().eval()
    loss_fn, make = LOSSES[loss]
    x, target = torch.randn(TIME, SAMPLES, WIDTH, dtype=torch.float64), make(SAMPLES)
    parts = [slice(0, 7), slice(7, None)]
    return net, loss_fn, (x, target), [(x[:, part], select_samples(target, part)) for part in parts]


def dense(net: nn.Module, x: Tensor, target: Any, *, loss_fn: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        return dense_of(net, x, target, loss_fn=loss_fn)


@pytest.mark.parametrize("loss", rest_slow(LOSSES))
@pytest.mark.parametrize("model", MODELS)
def test_uneven_batches_of_time_first_raise_without_a_weight(model: str, loss: str) -> None:
    net, loss_fn, whole, batches = problem(model, loss)
    op = HessianOperator(net, loss_fn, batches, engine="per_pass_graph")
    with pytest.raises(ValueError, match=r"in dimension 1\. .* so pass weight=lambda.*reduction="):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    right = HessianOperator(
        net, loss_fn, batches, engine="per_pass_graph", weight=lambda batch: batch[0].shape[1]
    )
    expected = dense(net, *whole, loss_fn=loss_fn)
    torch.testing.assert_close(columns(right), expected, rtol=0, atol=1e-12)


def test_the_ggn_refuses_them_too() -> None:
    net, loss_fn, _, batches = problem("LSTM", "mse")
    op = GGNOperator(net, loss_fn, batches)
    with pytest.raises(ValueError, match="pass weight=lambda batch"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("loss", rest_slow(LOSSES))
def test_even_batches_of_time_first_are_right(loss: str) -> None:
    net, loss_fn, whole, _ = problem("LSTM", loss)
    batches = [
        (whole[0][:, part], select_samples(whole[1], part))
        for part in (slice(0, 3), slice(3, 6), slice(6, 9))
    ]
    op = HessianOperator(net, loss_fn, batches, engine="per_pass_graph")
    expected = dense(net, *whole, loss_fn=loss_fn)
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-12)


def test_samples_of_other_lengths_whose_loss_is_a_mean_over_samples() -> None:
    """The root of each sample's loss is no mean over time, so that rows are the samples."""
    torch.manual_seed(1)

    def loss_fn(z: Tensor, target: Tensor) -> Tensor:
        return (z - target).square().mean((1, 2)).sqrt().mean()

    net = nn.Linear(WIDTH, 2).double()
    batches = [
        (
            torch.randn(n, length, WIDTH, dtype=torch.float64),
            torch.randn(n, length, 2, dtype=torch.float64),
        )
        for n, length in ((6, 5), (4, 3))
    ]
    op = HessianOperator(net, loss_fn, batches, engine="per_pass_graph")
    parts = [dense(net, *batch, loss_fn=loss_fn) for batch in batches]
    expected = 0.6 * parts[0] + 0.4 * parts[1]
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", ["rows", "tokens"])
def test_samples_of_other_lengths_need_a_weight(weight: str) -> None:
    """A mean over tokens is ambiguous, so that the weight must be explicit."""
    torch.manual_seed(1)
    net = nn.Linear(WIDTH, 2).double()
    sizes = ((6, 5), (6, 3))
    batches = [
        (torch.randn(*size, WIDTH, dtype=torch.float64), torch.randint(2, size)) for size in sizes
    ]
    op = HessianOperator(net, tokens, batches, engine="per_pass_graph")
    with pytest.raises(ValueError, match="if rows are the samples, weight=lambda batch: float"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    weighs = {"rows": lambda batch: len(batch[0]), "tokens": lambda batch: batch[1].numel()}
    op = HessianOperator(net, tokens, batches, engine="per_pass_graph", weight=weighs[weight])
    shares = [weighs[weight](batch) for batch in batches]
    parts = [dense(net, *batch, loss_fn=tokens) for batch in batches]
    expected = sum(w * part for w, part in zip(shares, parts, strict=True)) / math.fsum(shares)
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-12)
