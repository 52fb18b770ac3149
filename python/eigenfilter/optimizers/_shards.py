"""Optimizers that hold an unmarked shard of the model: which steps they must refuse."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.optimizers.amp import is_enabled

_FLAT = (
    "this method divides by a norm over the whole model, and FullyShardedDataParallel (FSDP1) "
    "gives each rank a flat shard of it: shard the model with FSDP2, "
    "torch.distributed.fsdp.fully_shard, over which norms are taken, or use "
)
FLAT_NORM = _FLAT + "USAM or TwoStepUSAM, which need no norm"


class ParentOptimizer:
    """The optimizer, if any, whose method constructs another optimizer.

    ZeroRedundancyOptimizer and its like construct an optimizer of the rank's parameters on each
    rank. Such an optimizer can descend: one rank updates a parameter and sends it to the others.
    It cannot ascend, because each rank would perturb other parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        parent = _constructing(optimizer)
        self._parent = None if parent is None else weakref.ref(parent)
        # Indices in the parent's parameters, and whether all ranks hold the same ones.
        self._rank_check: tuple[list[int], bool] | None = None

    def spanning_ranks(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
        """The parent if it has parameters on other ranks that `optimizer` lacks; else None."""
        parent = None if self._parent is None else self._parent()
        if parent is None or not _distributed.is_parallel():
            return None
        if getattr(parent, "world_size", 1) != 1:
            return parent
        of_parent = _ids(parent)
        own_ids = set(of_parent).intersection(_ids(optimizer))
        if len(own_ids) == len(of_parent):
            return None
        # `optimizer` holds some of the parent's parameters. In a parent that chains optimizers they
        # are the same on every rank.
        which = [i for i, key in enumerate(of_parent) if key in own_ids]
        if self._rank_check is None or self._rank_check[0] != which:
            like = optimizer.param_groups[0]["params"][0]
            self._rank_check = which, _distributed.is_same_on_all_ranks(which, like)
        return None if self._rank_check[1] else parent

    def refuse_ascent(
        self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], needs_norm: bool
    ) -> None:
        """Raise RuntimeError if an ascent with this rank's gradients would not be the method's.

        `params` are those that may be flat shards, over which no norm is taken (`needs_norm`).
        """
        outer = self.spanning_ranks(optimizer)
        if outer is not None:
            name, own = type(outer).__name__, type(optimizer).__name__
            raise RuntimeError(
                f"{own} inside {name} has the parameters of one rank, and would perturb those "
                "alone while every other rank perturbs its own: put the ascent around it, as in "
                f"SharpnessAware({name}(params, optimizer_class=torch.optim.SGD, ...), method, rho)"
            )
        if needs_norm and _distributed.flat_handles(params):
            raise RuntimeError(FLAT_NORM)

    def refuse_norm(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        """Raise RuntimeError if an update needs the norm of state that other ranks have."""
        outer = self.spanning_ranks(optimizer)
        if outer is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} inside {type(outer).__name__} has the parameters of "
                "one rank, and divides by the norm of all momentum buffers: shard the model with "
                "FSDP2, or use SGD(extrapolation=...), which needs no norm"
            )
        if _distributed.flat_handles(params):
            raise RuntimeError(_FLAT + "SGD(extrapolation=...), which needs no norm")

    def refuse_clipping(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        """Raise RuntimeError if the norm of this rank's gradients is not the total norm."""
        outer = self.spanning_ranks(optimizer)
        if outer is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} inside {type(outer).__name__} has the parameters of "
                "one rank, whose norm is not that of the whole gradient: call "
                "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)"
            )
        if _distributed.flat_handles(params):
            raise RuntimeError(
                "FullyShardedDataParallel (FSDP1) gives each rank a flat shard, whose norm is not "
                "that of the whole gradient: call model.clip_grad_norm_(max_norm), FSDP1's own, "
                "after the last ascent and, with a scaler, after scaler.unscale_(opt)"
            )


def refuse_local_scaler(scaler: torch.amp.GradScaler | None, are_flat: bool) -> None:
    """Raise RuntimeError for a scaler that checks only this rank's flat shards."""
    if not are_flat or not is_enabled(scaler):
        return
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    if not isinstance(scaler, ShardedGradScaler):
        raise RuntimeError(
            f"{type(scaler).__name__} looks at this rank's shard only, so that ranks would come to "
            "different scales: under FullyShardedDataParallel (FSDP1) use "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )


def refuse_scaled_descent(optimizer: torch.optim.Optimizer, are_flat: bool) -> None:
    """Raise RuntimeError if a scaler has checked only this rank's flat shards."""
    if are_flat and isinstance(vars(optimizer).get("grad_scale"), Tensor):
        raise RuntimeError(
            "scaler.step(opt) looks at this rank's shard only, so that ranks would come to "
            "different scales: under FullyShardedDataParallel (FSDP1) call scaler.unscale_(opt) of "
            "a ShardedGradScaler after the last ascent, before scaler.step(opt)"
        )


def other_ranks_wait(checks: bool, params: Sequence[Tensor]) -> bool:
    """Whether other ranks, which may have gradients, wait for this one without a gradient.

    Args:
        checks: whether all ranks share a flag for gradients that are not finite.
        params: the parameters. If other ranks hold all their elements, no gradient is missing.
    """
    if checks and _distributed.is_parallel():
        return True
    trained = [p for p in params if p.requires_grad]
    return len(trained) > 0 and all(
        p.numel() == 0 and _distributed.is_flattened(p) for p in trained
    )


def _ids(optimizer: torch.optim.Optimizer) -> list[int]:
    groups = getattr(optimizer, "param_groups", ())  # missing during its construction
    return [id(p) for group in groups for p in group["params"]]


def _constructing(own: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """The optimizer, other than `own`, with a method on the call stack."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if isinstance(caller, torch.optim.Optimizer) and caller is not own:
                return caller
    return None
