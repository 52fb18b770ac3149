"""Optimizers inside those of frameworks."""

from __future__ import annotations

from typing import Any

from eigenfilter.optimizers.base import EigenfilterOptimizer

# Attributes in which wrappers hold the optimizer that they wrap.
_INNER = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "optim", "opt")


def layers_of(optimizer: Any) -> list[Any]:
    """An optimizer, which may be any wrapper, and the optimizers that it wraps."""
    layers = [optimizer]
    for each in layers:
        inner = [getattr(each, name, None) for name in _INNER]
        layers += [
            o
            for o in inner
            if hasattr(o, "param_groups") and not any(o is known for known in layers)
        ]
    return layers


def optimizer_of(optimizer: Any) -> EigenfilterOptimizer | None:
    """The optimizer of this library that `optimizer` is or wraps; None if there is none."""
    return next((o for o in layers_of(optimizer) if isinstance(o, EigenfilterOptimizer)), None)
