"""A small regression whose layers and samples cannot be divided evenly among processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLES = 41


def network() -> nn.Sequential:
    """Layers of five rows and one row: with four processes the last one has no rows."""
    torch.manual_seed(41)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(42)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return x, x.sin().sum(dim=1, keepdim=True)


def share(rank: int, size: int) -> slice:
    """Half of the samples for the first process, the rest evenly among the others."""
    if rank == 0:
        return slice(SAMPLES // 2)
    ends = [SAMPLES // 2 + (SAMPLES - SAMPLES // 2) * r // (size - 1) for r in range(size)]
    return slice(ends[rank - 1], ends[rank])
