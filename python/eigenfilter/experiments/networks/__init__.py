"""Networks that can be built by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from eigenfilter.experiments.errors import quoted
from eigenfilter.experiments.networks.residual import resnet18, wide_resnet
from eigenfilter.experiments.networks.small import ACTIVATIONS, cnn, mlp
from eigenfilter.experiments.networks.vit import vit

__all__ = ["ACTIVATIONS", "HELP", "Task", "build", "parse"]

HELP = "mlp[-WIDTH...], cnn[-WIDTH], resnet18, wrn-DEPTH-K or vit[-WIDTH[-DEPTH]]"


@dataclass(frozen=True)
class ImageTask:
    """A classification task: images [channels, height, width], and the number of classes."""

    shape: tuple[int, int, int]
    classes: int


Make = Callable[[ImageTask, str, float], nn.Module]
"""A function of the task, the activation and the dropout probability."""


def parse(name: str) -> Make:
    """Return the function that builds the network of a name.

    Raises:
        ValueError: there is no such network; the message lists the names.
    """
    kind, *rest = name.split("-")
    if all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in rest):
        sizes = [int(word) for word in rest]
        if kind == "mlp":
            return lambda task, activation, dropout: mlp(task, sizes or [256], activation, dropout)
        if kind == "cnn" and len(sizes) <= 1:
            [width] = sizes or [32]
            return lambda task, activation, dropout: cnn(task, width, activation, dropout)
        if kind == "resnet18" and not sizes:
            return lambda task, activation, dropout: resnet18(task)
        if kind == "wrn" and len(sizes) == 2 and sizes[0] >= 10 and sizes[0] % 6 == 4:
            depth, k = sizes
            return lambda task, activation, dropout: wide_resnet(task, depth, k, dropout)
        if kind == "vit" and len(sizes) <= 2:
            width, depth = (*sizes, *(128, 6)[len(sizes) :])
            return lambda task, activation, dropout: vit(task, width, depth, activation, dropout)
    raise ValueError(f"must be {HELP} (DEPTH of wrn: 10, 16, 22, 28, ...), not {quoted(name)}")


def build(name: str, task: ImageTask, *, activation: str, dropout: float, seed: int) -> nn.Module:
    """Build a network in float32 on the CPU, without changing torch's global generator.

    Args:
        name: name of the network; see `HELP`.
        task: shape of the images and number of classes.
        activation: one of `ACTIVATIONS`; the residual networks always use ReLU.
        dropout: dropout probability, in [0, 1); ResNet-18 has no dropout.
        seed: seed of the initial weights.

    Returns:
        The network, from images [b, *task.shape] to scores [b, task.classes].

    Raises:
        ValueError: there is no such network, or it does not accept such images.
    """
    make = parse(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(task, activation, dropout)


def size(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(math.prod(p.shape) for p in network.parameters())
