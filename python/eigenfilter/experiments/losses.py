"""The losses of the experiments: functions of scores [n, classes] and labels [n] to a mean []."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def square(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over samples of ||scores - e_label||^2, where e are the unit vectors."""
    targets = F.one_hot(labels, scores.shape[1])
    return (scores - targets).square().sum(dim=1).mean()


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over samples of -log softmax(scores)_label, which has no minimum."""
    return F.cross_entropy(scores, labels)


LOSSES = {"square": square, "cross_entropy": cross_entropy}
