"""Embeddings while f is evaluated: settings with which f is a smooth function of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from eigenfilter import _distributed

_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag

# Gradients are dense, like vectors; the forward pass rewrites no rows; and the derivative is the
# derivative itself, not divided by the frequency of an index.
_SETTINGS: dict[str, Any] = {"sparse": False, "max_norm": None, "scale_grad_by_freq": False}


@contextmanager
def smooth(tree: nn.Module) -> Iterator[None]:
    """A context in which embeddings have the settings above."""
    own = [
        (module, name, getattr(module, name))
        for module in tree.modules()
        if isinstance(module, _EMBEDDINGS)
        for name, value in _SETTINGS.items()
        if getattr(module, name) != value
    ]
    try:
        for module, name, _ in own:
            setattr(module, name, _SETTINGS[name])
        yield
    finally:
        for module, name, value in own:
            setattr(module, name, value)


def beyond_max_norm(tree: nn.Module) -> list[str]:
    """Return the names of embeddings with rows longer than max_norm, which f would scale."""
    return [
        name
        for name, module in tree.named_modules()
        if isinstance(module, _EMBEDDINGS) and _has_longer_rows(module)
    ]


def _has_longer_rows(module: nn.Embedding | nn.EmbeddingBag) -> bool:
    """Whether a row is longer than max_norm, beyond the rounding of a norm."""
    if module.max_norm is None:
        return False
    weight = _distributed.local(module.weight.detach())
    lengths = torch.linalg.vector_norm(weight, module.norm_type, dim=1)
    most = module.max_norm * (1 + weight.shape[1] * torch.finfo(weight.dtype).eps)
    return bool((lengths > most).any())
