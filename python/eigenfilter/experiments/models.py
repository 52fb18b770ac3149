"""The networks of the experiments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


def tanh_network(
    seed: int, widths: tuple[int, ...] = (64, 40, 10), scale: float = 0.8
) -> nn.Module:
    """A fully connected tanh network in float64; torch's global random state is left alone.

    Args:
        seed: of the initial weights.
        widths: of the layers, the input first.
        scale: factor on torch's initial weights; below 1 training starts in a flatter place.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, dtype=torch.float64), nn.Tanh()]
    network = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network
