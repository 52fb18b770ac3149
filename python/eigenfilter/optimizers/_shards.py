"""Shards that nothing marks as such: an optimizer that holds one sees a part of the model alone."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter import _distributed

FLAT_NORM = (
    "this method divides by a norm over the whole model, and FullyShardedDataParallel (FSDP1) "
    "gives each rank a flat shard of it: shard the model with FSDP2, "
    "torch.distributed.fsdp.fully_shard, over which norms are taken, or use USAM or TwoStepUSAM, "
    "which need no norm"
)


class Parent:
    """The optimizer, if any, in one of whose methods another one is constructed.

    ZeroRedundancyOptimizer, and whatever works as it does, constructs on each rank an optimizer of
    the rank's parameters. Such an optimizer can descend: each parameter is updated on one rank and
    sent to the others. It cannot ascend, because each rank would perturb other parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        parent = _constructing(optimizer)
        self._parent = None if parent is None else weakref.ref(parent)
        self._seen: tuple[list[int], bool] | None = None  # a part of the parent's, is it all ranks'

    def of_more_than(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
        """The parent, if it has parameters on other ranks that `optimizer` has not; else None."""
        parent = None if self._parent is None else self._parent()
        if parent is None or not _distributed.is_parallel():
            return None
        if getattr(parent, "world_size", 1) != 1:
            return parent
        of_parent = _ids(parent)
        held = set(of_parent).intersection(_ids(optimizer))
        if len(held) == len(of_parent):
            return None
        # A part of the parent's. In an optimizer made of several it is the same on every rank.
        which = [i for i, key in enumerate(of_parent) if key in held]
        if self._seen is None or self._seen[0] != which:
            self._seen = which, _distributed.is_alike(which, optimizer.param_groups[0]["params"][0])
        return None if self._seen[1] else parent


def refuse_ascent(
    optimizer: torch.optim.Optimizer, parent: Parent, params: Sequence[Tensor], takes_norm: bool
) -> None:
    """Raise RuntimeError where an ascent by this rank's gradients would not be the method's.

    Args:
        optimizer: it would ascend.
        parent: where it was constructed.
        params: those of its parameters that may be flat shards.
        takes_norm: whether it takes a norm of all gradients.
    """
    outer = parent.of_more_than(optimizer)
    if outer is not None:
        name, own = type(outer).__name__, type(optimizer).__name__
        raise RuntimeError(
            f"{own} inside {name} has the parameters of one rank, and would perturb those alone "
            "while every other rank perturbs its own: put the ascent around it, as in "
            f"SharpnessAware({name}(params, optimizer_class=torch.optim.SGD, ...), method, rho)"
        )
    if takes_norm and _distributed.flat_handles(params):
        raise RuntimeError(FLAT_NORM)


def refuse_clipping(
    optimizer: torch.optim.Optimizer, parent: Parent, params: Sequence[Tensor]
) -> None:
    """Raise RuntimeError where the norm of this rank's gradients is not that of the whole."""
    outer = parent.of_more_than(optimizer)
    if outer is not None:
        raise RuntimeError(
            f"{type(optimizer).__name__} inside {type(outer).__name__} has the parameters of one "
            "rank, whose norm is not that of the whole gradient: call "
            "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)"
        )
    if _distributed.flat_handles(params):
        raise RuntimeError(
            "FullyShardedDataParallel (FSDP1) gives each rank a flat shard, whose norm is not that "
            "of the whole gradient: call model.clip_grad_norm_(max_norm), FSDP1's own, after the "
            "last ascent and, with a scaler, after scaler.unscale_(opt)"
        )


def refuse_local_scaler(scaler: torch.amp.GradScaler | None) -> None:
    """Raise RuntimeError for a scaler that looks at this rank's flat shards only."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    if scaler is not None and scaler.is_enabled() and not isinstance(scaler, ShardedGradScaler):
        raise RuntimeError(
            f"{type(scaler).__name__} looks at this rank's shard only, so that ranks would come to "
            "different scales: under FullyShardedDataParallel (FSDP1) use "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )


def refuse_scaled_descent(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError if a scaler has looked at this rank's flat shards without the others."""
    if isinstance(vars(optimizer).get("grad_scale"), Tensor):
        raise RuntimeError(
            "scaler.step(opt) looks at this rank's shard only, so that ranks would come to "
            "different scales: under FullyShardedDataParallel (FSDP1) call scaler.unscale_(opt) of "
            "a ShardedGradScaler after the last ascent, before scaler.step(opt)"
        )


def lies_elsewhere(params: Sequence[Tensor]) -> bool:
    """Whether other ranks hold all elements of some parameters: no gradient is missing here."""
    trained = [p for p in params if p.requires_grad]
    return len(trained) > 0 and all(
        p.numel() == 0 and _distributed.is_flattened(p) for p in trained
    )


def _ids(optimizer: torch.optim.Optimizer) -> list[int]:
    groups = getattr(optimizer, "param_groups", ())  # none yet while it is being constructed
    return [id(p) for group in groups for p in group["params"]]


def _constructing(own: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """The optimizer, other than `own`, whose method has led to this call."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if isinstance(caller, torch.optim.Optimizer) and caller is not own:
                return caller
    return None
