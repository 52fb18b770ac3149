"""The optimizers that hold perturbed parameters right now.

An optimizer registers itself between an ascent and the step or restore that undoes it. Operators
ask before they use a parameter, because a Hessian at a perturbed point is silently the wrong one.
So do the methods of torch that save, load or average the weights of a model.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from eigenfilter import _callers

_perturbed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_warned: weakref.WeakKeyDictionary[torch.optim.Optimizer, set[str]] = weakref.WeakKeyDictionary()

# Methods that take weights: class, name, position of the model or parameter among the arguments,
# and the verb of the warning.
_USES: tuple[tuple[type, str, int, str], ...] = (
    (nn.Module, "state_dict", 0, "state_dict() reads"),
    (nn.Module, "load_state_dict", 0, "load_state_dict() overwrites"),
    (AveragedModel, "update_parameters", 1, "update_parameters() averages"),
    (nn.Parameter, "__deepcopy__", 0, "copy.deepcopy() copies"),
    (nn.Parameter, "__reduce_ex__", 0, "pickling or torch.save() saves"),
)
_watching = False


def enter(optimizer: torch.optim.Optimizer) -> None:
    """Record that `optimizer` has perturbed its parameters."""
    if not _watching:
        _watch()
    _perturbed.add(optimizer)


def leave(optimizer: torch.optim.Optimizer) -> None:
    """Record that `optimizer` has restored its parameters."""
    _perturbed.discard(optimizer)


def holder(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer | None:
    """Return an optimizer that has perturbed any of `params`, or None."""
    if not _perturbed:
        return None
    ids = {id(p) for p in params}
    for optimizer in list(_perturbed):
        if not ids.isdisjoint(_perturbed_ids(optimizer)):
            return optimizer
    return None


def _perturbed_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    """Ids of the parameters that an optimizer has perturbed, or all if it does not tell."""
    ids: set[int] | None = (
        optimizer._perturbed_ids() if hasattr(optimizer, "_perturbed_ids") else None
    )
    if ids is None:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return ids


def _watch() -> None:
    """Wrap the methods in `_USES`, at the first ascent of this process, to warn of perturbations.

    Weights do not know their optimizers, and torch has no hook that sees every module's state_dict.
    A process that takes no ascent keeps the methods as they are.
    """
    global _watching
    _watching = True
    for owner, name, position, use in _USES:
        setattr(owner, name, _watched(getattr(owner, name), position, use))
    register_optimizer_step_pre_hook(_refuse_step)


def _watched(method: Any, position: int, use: str) -> Any:
    """Wrap `method` to warn first if the weights that it takes are perturbed."""

    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(use not in _warned.get(optimizer, ()) for optimizer in list(_perturbed)):
            for weights in (self, *args, *kwargs.values())[position : position + 1]:
                _warn(weights, use)
        return method(self, *args, **kwargs)

    return watched


def _refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raise RuntimeError if `optimizer` is to step from weights that another one has perturbed."""
    if not _perturbed or optimizer in _perturbed:
        return
    other = holder(p for group in optimizer.param_groups for p in group["params"])
    if other is None or _holds(optimizer, other):
        return  # a wrapper passes the step on
    state = vars(other).get("_step_state")
    if state is not None and vars(optimizer).get("_step_state") is state:
        return  # a framework's copy of it
    mine, its = type(optimizer).__name__, type(other).__name__
    raise RuntimeError(
        f"{mine}.step() would start from perturbed weights, and its update would be undone: "
        f"{its} is in the middle of a step. End that with step() of {its}, or call its restore() "
        "first"
    )


def _holds(wrapper: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether `wrapper` has `optimizer` as an attribute, in a list, or through another wrapper."""
    visited: set[int] = set()
    ahead: list[Any] = [wrapper]
    while ahead:
        one = ahead.pop()
        if one is optimizer:
            return True
        if id(one) in visited:
            continue
        visited.add(id(one))
        if isinstance(one, torch.optim.Optimizer):
            ahead.extend(v for k, v in vars(one).items() if k not in ("state", "param_groups"))
        elif isinstance(one, (list, tuple)):
            ahead.extend(one)
        elif isinstance(one, dict):
            ahead.extend(one.values())
    return False


def _warn(weights: nn.Module | torch.Tensor, use: str) -> None:
    """Warn, once for each optimizer and use, if an optimizer has perturbed the weights."""
    params = weights.parameters() if isinstance(weights, nn.Module) else [weights]
    optimizer = holder(params)
    if optimizer is None or use in _warned.setdefault(optimizer, set()):
        return
    _warned[optimizer].add(use)
    warnings.warn(
        f"{use} perturbed weights: {type(optimizer).__name__} is in the middle of a step, whose "
        "end, step() or restore(), puts back the weights from before it. Do this after step(), or "
        "call restore() first",
        stacklevel=_callers.stacklevel(),
    )
