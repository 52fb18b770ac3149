"""Optimizers inside those of frameworks."""

from __future__ import annotations

from typing import Any

import torch

from eigenfilter.optimizers.base import EigenfilterOptimizer

# Attributes in which wrappers hold the optimizer that they wrap.
_INNER = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "optim", "opt")


def layers_of(optimizer: Any) -> list[Any]:
    """An optimizer, which may be any wrapper, and the optimizers that it wraps."""
    layers = [optimizer]
    for each in layers:
        inner = [getattr(each, name, None) for name in _INNER]
        layers += [o for o in inner if _is_optimizer(o) and not any(o is k for k in layers)]
    return layers


def _is_optimizer(candidate: Any) -> bool:
    return isinstance(candidate, torch.optim.Optimizer) or hasattr(candidate, "param_groups")


def optimizer_of(optimizer: Any) -> EigenfilterOptimizer | None:
    """The optimizer of this library that `optimizer` is or wraps; None if there is none."""
    return next((o for o in layers_of(optimizer) if isinstance(o, EigenfilterOptimizer)), None)
