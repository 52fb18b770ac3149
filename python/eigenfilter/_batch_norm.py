"""Batch normalisation at perturbed weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def freeze_batch_norm(model: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are inside the context.

    Layers in training mode still normalise by their batch. Meant for gradients at perturbed
    weights: without it the running statistics mix those of x with those of points nobody
    evaluates at.

    Args:
        model: every batch-norm layer in it is frozen.

    Example:
        >>> while opt.ascend():
        ...     with eigenfilter.freeze_batch_norm(model):
        ...         closure()
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
