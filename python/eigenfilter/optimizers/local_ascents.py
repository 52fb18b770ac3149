"""Ascents along the gradient of each process alone, which nothing communicates (m-sharpness)."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from eigenfilter import _distributed
from eigenfilter.optimizers._step_state import owner_of
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.layers import optimizer_of

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
    forward pass of the model; the backward pass has to follow in the same phase. A descent along a
    local gradient, as where rho was set to 0 after the backward pass, is refused. If several
    optimizers hold the same parameters, an ascent is local while all of them are to ascend.
    Gradients that are accumulated under `no_sync()` in the descent stay so. If only one process
    takes part, nothing changes.

    Args:
        model: the wrapped model, or a module that contains it.
        opt: the optimizer of all its trainable parameters, or a framework's wrapper of it.
        enabled: whether the gradients of the ascents are synchronized, as by default.

    Raises:
        TypeError: `opt` is no optimizer of this library, or `model` no module.
        ValueError: the model is not wrapped, or shards its parameters without replicas, or in a
            way that offers no local gradient, or has trainable parameters that are not in the
            optimizer's groups. Nothing has changed then.
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
    if not enabled:
        hooks = [(t, hook) for t, hook in _replicated_targets(model) if _replicas(t) > 1]
        _refuse_other_parameters(owner, [target for target, _ in hooks])
        for target, hook in hooks:
            if target not in _hooks:
                _hooks[target] = hook(target)
            _hooks[target].add(target, owner)
        return
    for target in _targets(model):
        if target in _hooks:
            _hooks[target].discard(target, owner)


class _Hook:
    """Switches what averages gradients, at each of its forward passes, by the optimizers' phases.

    It stays when all optimizers have left it, and does nothing then, nor in a copy of the model.
    """

    _optimizers: Collection[Any] = ()

    def __init__(self, target: Any) -> None:
        self._optimizers = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def add(self, target: Any, optimizer: EigenfilterOptimizer) -> None:
        cast("weakref.WeakSet[Any]", self._optimizers).add(optimizer)
        optimizer._step_state.with_local_ascents.add(target)
        _distributed.with_local_ascents.add(target)

    def discard(self, target: Any, optimizer: EigenfilterOptimizer) -> None:
        cast("weakref.WeakSet[Any]", self._optimizers).discard(optimizer)
        optimizer._step_state.with_local_ascents.discard(target)
        if not self._optimizers:
            _distributed.with_local_ascents.discard(target)

    def _is_local(self) -> bool:
        """Whether the next gradient is an ascent's, to every optimizer of these parameters."""
        optimizers = list(self._optimizers)
        return bool(optimizers) and all(o.phase == "ascent" for o in optimizers)

    def _record(self, target: Any, is_local: bool) -> None:
        """Tell the optimizers whether the gradient of this forward pass will be local."""
        if not torch.is_grad_enabled():
            return
        for optimizer in list(self._optimizers):
            targets = optimizer._step_state.with_local_gradients
            targets.add(target) if is_local else targets.discard(target)


_hooks: weakref.WeakKeyDictionary[Any, _Hook] = weakref.WeakKeyDictionary()
"""The hook of every target: a DistributedDataParallel, or a group of FSDP2's parameters."""


class _LocalReplica(_Hook):
    """Runs the forward pass of DistributedDataParallel as `no_sync` does, for an ascent."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self._before: list[bool] = []  # a stack, because a forward pass may call the model again
        target.register_forward_pre_hook(self.before)
        target.register_forward_hook(self.after, always_call=True)

    @_disable_dynamo
    def before(self, module: Any, inputs: Any) -> None:
        if not self._optimizers:
            return
        is_local = self._is_local()
        self._before.append(module.require_backward_grad_sync)
        if is_local:
            _refuse_static_graph(module)
            module.require_backward_grad_sync = False
        if is_local or module.require_backward_grad_sync:  # not where the caller has no_sync
            self._record(module, is_local)

    @_disable_dynamo
    def after(self, module: Any, inputs: Any, output: Any) -> None:
        if vars(self).get("_before"):
            module.require_backward_grad_sync = self._before.pop()


def _refuse_static_graph(module: Any) -> None:
    if module.static_graph and not module._static_graph_delay_allreduce_enqueued:
        raise RuntimeError(
            "static_graph=True has DistributedDataParallel record its first backward pass, "
            "which it synchronizes: take one forward and backward pass, and opt.zero_grad(), "
            "before ascent_sync(model, opt, enabled=False)"
        )


class _LocalShards(_Hook):
    """Has FSDP2 reduce gradients within each replica, and not across replicas, for an ascent.

    `set_requires_all_reduce(False)` would keep the reduced gradients in a buffer of FSDP2 instead
    of the parameters' `grad`. A group's `pre_forward` runs before the module's own forward pass and
    before all methods that `register_fsdp_forward_method` has registered.
    """

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self._info = target.mesh_info
        group, inner = target, target.pre_forward  # the hook itself must not keep the group alive

        @functools.wraps(inner)
        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            self.before(group)
            return inner(*args, **kwargs)

        target.pre_forward = pre_forward

    @_disable_dynamo
    def before(self, group: Any) -> None:
        is_local = self._is_local()
        self._switch(group, is_local)
        if is_local or group.all_reduce_grads:
            self._record(group, is_local)

    def discard(self, target: Any, optimizer: EigenfilterOptimizer) -> None:
        super().discard(target, optimizer)
        if not self._optimizers:
            self._switch(target, False)

    def _switch(self, group: Any, is_local: bool) -> None:
        group.mesh_info = _within_replica(self._info) if is_local else self._info


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


def _targets(model: nn.Module) -> list[Any]:
    """What may average gradients in `model`: each DistributedDataParallel, each group of FSDP2."""
    targets: list[Any] = []
    for module in model.modules():
        is_replica = isinstance(module, DistributedDataParallel)
        targets += [module] if is_replica else _distributed.fsdp_groups(module)
    return list(dict.fromkeys(targets))  # modules that are sharded together share a group


def _replicas(target: Any) -> int:
    """The number of replicas over which gradients are averaged: with 1, they are never local."""
    if isinstance(target, DistributedDataParallel):
        return dist.get_world_size(target.process_group)
    return int(target.mesh_info.replicate_mesh_size)


def _refuse_other_parameters(optimizer: EigenfilterOptimizer, targets: Sequence[Any]) -> None:
    """Raise ValueError if another optimizer, which may descend meanwhile, has to train some."""
    own = set(map(id, optimizer._params()))
    for target in targets:
        if isinstance(target, DistributedDataParallel):
            ignored = target.parameters_to_ignore
            named = target.module.named_parameters()
            params = [p for name, p in named if name not in ignored]
        else:
            params = [p.sharded_param for p in target.fsdp_params]
        others = [p for p in params if p.requires_grad and id(p) not in own]
        if others:
            raise ValueError(
                f"{len(others)} trainable parameters of the model are not in the optimizer's "
                "groups: another optimizer would descend along gradients that this one's ascents "
                "leave local. Give one optimizer all of them, in groups (rho=0.0 for those that "
                "take no ascent), freeze them by requires_grad_(False), or pass only the wrapped "
                "module that this optimizer trains"
            )


def _replicated_targets(model: nn.Module) -> list[tuple[Any, type[_Hook]]]:
    """What averages gradients over replicas in `model`, each with its hook."""
    hooks: dict[Any, type[_Hook]] = {}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            if getattr(module, "_use_python_reducer", False):
                raise ValueError(
                    "DistributedDataParallel reduces gradients by compiled autograd here "
                    '(optimize_ddp="python_reducer"), outside of no_sync: leave '
                    "torch._dynamo.config.optimize_ddp at its default"
                )
            hooks[module] = _LocalReplica
        elif groups := _distributed.fsdp_groups(module):
            hooks |= {group: _LocalShards for group in groups if _is_replicated(group)}
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
    return list(hooks.items())


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
    if isinstance(info, HSDPMeshInfo) or group in _hooks:  # which may have changed it
        return True
    if not isinstance(info, FSDPMeshInfo):
        raise ValueError(
            "replicate() of FSDP2 averages the gradients of this model, and cannot leave them "
            "local: use DistributedDataParallel"
        )
    if info.shard_mesh_size > 1:
        raise ValueError(NOT_REPLICATED)
    return False
