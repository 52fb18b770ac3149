"""Which optimizers hold their parameters away from x right now.

Optimizers enter themselves between an ascent and the step or restore that undoes it; operators ask
before they use a parameter, because a Hessian at a perturbed point is silently the wrong one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

_perturbed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def enter(optimizer: torch.optim.Optimizer) -> None:
    """Record that `optimizer` has moved its parameters away from x."""
    _perturbed.add(optimizer)


def leave(optimizer: torch.optim.Optimizer) -> None:
    """Record that `optimizer` has put its parameters back at x."""
    _perturbed.discard(optimizer)


def holder(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer | None:
    """Return an optimizer that holds any of `params` away from x, or None."""
    if not _perturbed:
        return None
    ids = {id(p) for p in params}
    for optimizer in list(_perturbed):
        if any(id(p) in ids for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    return None
