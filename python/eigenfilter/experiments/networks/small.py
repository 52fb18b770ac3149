"""A fully connected and a small convolutional network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from eigenfilter.experiments.networks import ImageTask

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def mlp(task: ImageTask, widths: Sequence[int], activation: str, dropout: float) -> nn.Module:
    """Return a fully connected network with hidden layers of these widths."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise([math.prod(task.shape), *widths]):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation](), *_dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], task.classes))


def cnn(task: ImageTask, width: int, activation: str, dropout: float) -> nn.Module:
    """Return a network of three 3x3 convolutions of w, 2 w and 4 w channels and a linear layer.

    Each convolution is followed by 2x2 average pooling. There is no batch normalization, so that
    the loss of a batch is a mean over its images.

    Raises:
        ValueError: the image has fewer than 8 pixels per side.
    """
    channels, height, length = task.shape
    places = (height // 8) * (length // 8)
    if not places:
        raise ValueError(f"cnn needs images of at least 8x8, not {height}x{length}")
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        act(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        act(),
        nn.AvgPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        act(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        *_dropout(dropout),
        nn.Linear(4 * width * places, task.classes),
    )


def _dropout(probability: float) -> list[nn.Module]:
    return [nn.Dropout(probability)] if probability else []
