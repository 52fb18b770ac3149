"""Losses that weigh samples or add them up, and the weights of their batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def split(x: Tensor, target: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), target.split(sizes), strict=True))


def weighted(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, weight=CLASSES)


def summed(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="sum")


def of_classes(batch: Any) -> Tensor:
    return CLASSES[batch[1]].sum()
