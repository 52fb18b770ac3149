"""Ascents along the gradient of each process alone, which nothing communicates (m-sharpness)."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from eigenfilter import _distributed
from eigenfilter.optimizers._layers import optimizer_of
from eigenfilter.optimizers._step_state import owner_of
from eigenfilter.optimizers.base import EigenfilterOptimizer

NOT_REPLICATED = (
    "ascent_sync(enabled=False) needs replicas of the model, and FSDP2 (fully_shard) shards this "
    "one over all processes: each would ascend to a point of its own, and would have to hold all "
    "weights of that point and the whole gradient, unsharded, until the step ends. Shard over a "
    "mesh of two dimensions, (replicas, shards), so that the processes of one replica ascend "
    "together; or use DistributedDataParallel; or leave the ascents synchronized"
)


def ascent_sync(model: nn.Module, opt: torch.optim.Optimizer, enabled: bool = False) -> None:
    r"""Take the ascents along local gradients (m-sharpness), or along synchronized ones again.

    With f_i the mean loss over the samples of process i, for USAM

        enabled=False:  y_i = x + rho grad f_i(x);          d = mean_i grad f_i(y_i)
        enabled=True:   y = x + rho mean_i grad f_i(x);     d = mean_i grad f_i(y)

    and likewise for the other methods, whose norms are then local, too. Only the descent's gradient
    is communicated. All processes apply the same update to the same x, bit for bit, although they
    are perturbed to different points in between.

    Under DistributedDataParallel each process is a replica. Under FSDP2 with a mesh of two
    dimensions (HSDP) a replica is a group of processes that share its shards: i counts these
    groups, and the ascent's gradient is reduced within a group but not across them.

    It applies from the next forward pass on to both ways to step, and reads `opt.phase` at each
    forward pass of the model; the backward pass has to follow in the same phase. Gradients that
    are accumulated under `no_sync()` in the descent stay so. If only one process takes part,
    nothing changes.

    Args:
        model: the wrapped model, or a module that contains it.
        opt: the optimizer of its parameters, or a framework's wrapper of it.
        enabled: whether the gradients of the ascents are synchronized, as by default.

    Raises:
        TypeError: `opt` is no optimizer of this library, or `model` no module.
        ValueError: the model is not wrapped, or shards its parameters without replicas, or in a
            way that offers no local gradient.
        RuntimeError: the parameters are perturbed.

    Example:
        >>> model = torch.nn.Linear(3, 1)  # in several processes: DistributedDataParallel(model)
        >>> opt = eigenfilter.SAM(model.parameters(), lr=0.1, rho=0.05)
        >>> eigenfilter.ascent_sync(model, opt, enabled=False)

    Source: P. Foret et al., 2021, arXiv 2010.01412, section 4.1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, and is {type(model).__name__}")
    owner = _optimizer_in(opt)
    owner._refuse_perturbed("ascent_sync()")
    for module in model.modules():
        if module in _hooks:
            _hooks.pop(module).remove(module)
            _distributed.with_local_ascents.discard(module)
    replicated = [] if enabled else _replicated_modules(model)
    owner._step_state.ascents_are_local = len(replicated) > 0
    for module, hook in replicated:
        _hooks[module] = hook(module, owner)
        _distributed.with_local_ascents.add(module)


class _Hook:
    """Hooks around the forward pass of a module; in a copy of the module they do nothing."""

    _optimizer: Any = staticmethod(lambda: None)

    def __init__(self, module: nn.Module, optimizer: EigenfilterOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = [module.register_forward_pre_hook(self.before)]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def remove(self, module: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()

    @_disable_dynamo
    def before(self, module: Any, inputs: Any) -> None:
        optimizer = self._optimizer()
        self.set_local(module, optimizer is not None and optimizer.phase == "ascent")

    def set_local(self, module: Any, is_local: bool) -> None:
        raise NotImplementedError


_hooks: weakref.WeakKeyDictionary[nn.Module, _Hook] = weakref.WeakKeyDictionary()
"""The hooks of every module whose ascents are local."""


class _LocalReplica(_Hook):
    """Runs the forward pass of DistributedDataParallel as `no_sync` does, for an ascent."""

    def __init__(self, module: nn.Module, optimizer: EigenfilterOptimizer) -> None:
        super().__init__(module, optimizer)
        self._handles.append(module.register_forward_hook(self.after, always_call=True))

    def set_local(self, module: Any, is_local: bool) -> None:
        self._before = module.require_backward_grad_sync
        if not is_local:
            return
        if module.static_graph and not module._static_graph_delay_allreduce_enqueued:
            raise RuntimeError(
                "static_graph=True has DistributedDataParallel record its first backward pass, "
                "which it synchronizes: take one forward and backward pass, and opt.zero_grad(), "
                "before ascent_sync(model, opt, enabled=False)"
            )
        module.require_backward_grad_sync = False

    @_disable_dynamo
    def after(self, module: Any, inputs: Any, output: Any) -> None:
        if "_before" in vars(self):
            module.require_backward_grad_sync = vars(self).pop("_before")


class _LocalShards(_Hook):
    """Has FSDP2 reduce gradients within each replica, and not across replicas, for an ascent.

    `set_requires_all_reduce(False)` would keep the reduced gradients in a buffer of FSDP2 instead
    of the parameters' `grad`.
    """

    _infos: Sequence[Any] = ()

    def __init__(self, module: nn.Module, optimizer: EigenfilterOptimizer) -> None:
        super().__init__(module, optimizer)
        self._infos = [group.mesh_info for group in _distributed.fsdp_groups(module)]

    def remove(self, module: nn.Module) -> None:
        super().remove(module)
        self.set_local(module, False)

    def set_local(self, module: Any, is_local: bool) -> None:
        groups = _distributed.fsdp_groups(module)
        for group, info in zip(groups, self._infos, strict=True):
            group.mesh_info = _within_replica(info) if is_local else info


def _within_replica(info: Any) -> Any:
    """The mesh of an HSDP module without its dimension of replicas."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    local = copy.copy(info)
    local.__class__ = FSDPMeshInfo
    return local


def _optimizer_in(opt: Any) -> EigenfilterOptimizer:
    """The optimizer of this library that `opt` is or wraps."""
    found = optimizer_of(opt)
    if found is None:
        raise TypeError(
            f"ascent_sync needs an optimizer that takes ascents, and {type(opt).__name__} is "
            "none of eigenfilter: pass USAM, SAM, ..., or SharpnessAware around your optimizer"
        )
    owner: EigenfilterOptimizer = owner_of(found)
    return owner


def _replicated_modules(model: nn.Module) -> list[tuple[nn.Module, type[_Hook]]]:
    """The modules in `model` that average gradients over replicas, each with its hooks."""
    hooks: list[tuple[nn.Module, type[_Hook]]] = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            if getattr(module, "_use_python_reducer", False):
                raise ValueError(
                    "DistributedDataParallel reduces gradients by compiled autograd here "
                    '(optimize_ddp="python_reducer"), outside of no_sync: leave '
                    "torch._dynamo.config.optimize_ddp at its default"
                )
            hooks.append((module, _LocalReplica))
        elif groups := _distributed.fsdp_groups(module):
            if any(map(_is_replicated, groups)):
                hooks.append((module, _LocalShards))
        elif _distributed.is_fsdp1(module):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) offers no local gradients of its shards: use "
                "DistributedDataParallel, or FSDP2 (fully_shard) over a mesh of two dimensions"
            )
    if not hooks and _distributed.is_parallel() and not _distributed.is_fsdp(model):
        raise ValueError(
            f"{type(model).__name__} contains no DistributedDataParallel and no FSDP2 module whose "
            "gradients could stay local: pass the wrapped model"
        )
    return hooks


def _is_replicated(group: Any) -> bool:
    """Whether a group of FSDP2's parameters has replicas; False if one process holds all of it.

    Raises:
        ValueError: it is sharded without replicas, or its gradients are not means.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo

    info = group.mesh_info
    if group.gradient_divide_factor is not None:
        raise ValueError(
            "set_gradient_divide_factor has FSDP2 divide gradients by a number of your own, which "
            "leaves the scale of a local gradient open: leave it out, and scale the loss"
        )
    if isinstance(info, HSDPMeshInfo):
        return True
    if not isinstance(info, FSDPMeshInfo):
        raise ValueError(
            "replicate() of FSDP2 averages the gradients of this model, and cannot leave them "
            "local: use DistributedDataParallel"
        )
    if info.shard_mesh_size > 1:
        raise ValueError(NOT_REPLICATED)
    return False
