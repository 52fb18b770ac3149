"""The networks by name: shapes, sizes, seeds, and errors about images that do not fit."""

from __future__ import annotations

import pytest
import torch

from eigenfilter.experiments.networks import ImageTask, build, parse, size

DIGITS, MNIST, CIFAR = (
    ImageTask((1, 8, 8), 10),
    ImageTask((1, 28, 28), 10),
    ImageTask((3, 32, 32), 100),
)


def make(name: str, task: ImageTask, seed: int = 1, activation: str = "tanh", dropout: float = 0.1):
    return build(name, task, activation=activation, dropout=dropout, seed=seed)


@pytest.mark.parametrize("task", [DIGITS, MNIST, CIFAR], ids=["digits", "mnist", "cifar"])
@pytest.mark.parametrize("name", ["mlp", "mlp-20-30", "cnn", "cnn-4", "wrn-10-1", "vit-32-2"])
def test_scores_have_their_shape(name: str, task: ImageTask) -> None:
    network = make(name, task)
    assert network.training
    scores = network(torch.randn(3, *task.shape))
    assert scores.shape == (3, task.classes)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.2), ("wrn-40-4", 8.9), ("wrn-16-8", 11.0), ("wrn-28-10", 36.5)],
)
def test_sizes_are_the_published_ones(name: str, millions: float) -> None:
    """The sizes are those of ResNet-18 for CIFAR, and of the tables in arXiv 1605.07146."""
    with torch.device("meta"):
        network = parse(name)(ImageTask((3, 32, 32), 10), "relu", 0.0)
    assert size(network) / 1e6 == pytest.approx(millions, abs=0.05)


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (make("vit-32-1", DIGITS, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.positions, other.positions)


def test_activation_and_dropout_arrive() -> None:
    assert "Tanh()" in str(make("mlp", DIGITS))
    assert "GELU" in str(make("vit-32-1", DIGITS, activation="gelu"))
    for name in ("mlp", "cnn", "wrn-10-1", "vit-32-1"):
        assert "Dropout(p=0.1" in str(make(name, DIGITS))


def test_the_attention_is_torchs() -> None:
    network = make("vit-64-1", DIGITS)
    block = network.blocks[0]
    x = torch.randn(2, 16, 64)
    q, k, v = block.qkv(x).view(2, 16, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ours = block._attend(x).view(2, 16, 2, 32).transpose(1, 2)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "name", ["", "lenet", "mlp-0", "mlp-x", "cnn-1-2", "resnet18-2", "wrn-12-1", "wrn-4-1", "wrn"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be mlp\[-WIDTH.*, not '"):
        parse(name)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="at least 8x8, not 2x2"):
        make("cnn", ImageTask((1, 2, 2), 10))
    with pytest.raises(ValueError, match="sides are multiples of 2"):
        make("vit", ImageTask((1, 7, 7), 10))
    with pytest.raises(ValueError, match="multiple of 32, not 40"):
        make("vit-40", DIGITS)
