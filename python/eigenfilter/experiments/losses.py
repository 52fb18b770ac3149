"""The losses of the experiments: scores [n, classes] and labels [n] to a mean over samples []."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def square(scores: Tensor, labels: Tensor) -> Tensor:
    """||scores - e_label||^2, e the unit vectors; mean over samples."""
    targets = F.one_hot(labels, scores.shape[1])
    return (scores - targets).square().sum(dim=1).mean()


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(scores)_label, mean over samples. No scores minimise it."""
    return F.cross_entropy(scores, labels)


LOSSES = {"square": square, "cross_entropy": cross_entropy}
