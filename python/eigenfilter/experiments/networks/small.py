"""A fully connected and a small convolutional network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from eigenfilter.experiments.networks import Task

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def mlp(task: Task, widths: Sequence[int], activation: str, dropout: float) -> nn.Module:
    """A fully connected network with hidden layers of these widths."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise([math.prod(task.shape), *widths]):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation](), *_dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], task.classes))


def cnn(task: Task, width: int, activation: str, dropout: float) -> nn.Module:
    """Three 3x3 convolutions of w, 2 w and 4 w channels, then the mean over places.

    Two poolings halve the image. No batch normalisation: its loss is one function of the weights.
    """
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Conv2d(task.shape[0], width, 3, padding=1),
        act(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        act(),
        nn.AvgPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        act(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *_dropout(dropout),
        nn.Linear(4 * width, task.classes),
    )


def _dropout(probability: float) -> list[nn.Module]:
    return [nn.Dropout(probability)] if probability else []
