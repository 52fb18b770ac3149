"""Sharded parameters: local shards of DTensors, and updates that FSDP must notice."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

TENSOR = "torch.distributed.tensor"
FSDP = "torch.distributed.fsdp"
COLLECTIVES = "torch.distributed._functional_collectives"


def _class_of(module: str, name: str) -> type | tuple[()]:
    """A class of torch.distributed, which is slow to import; () if it is not imported yet.

    No object of that class exists then, and nothing is an instance of ().
    """
    loaded = sys.modules.get(module)
    return cast(type, getattr(loaded, name, ()))


def is_dtensor(t: Tensor) -> bool:
    """Whether `t` is a DTensor."""
    return isinstance(t, _class_of(TENSOR, "DTensor"))


def local(t: Tensor) -> Tensor:
    """The memory of `t` in this process: a DTensor's local shard, any other tensor itself."""
    return cast("DTensor", t)._local_tensor if is_dtensor(t) else t


def wait_for_collective(t: Tensor) -> Tensor:
    """Wait for the collective that computes `t`, if any, and return its result."""
    if isinstance(t, _class_of(COLLECTIVES, "AsyncCollectiveTensor")):
        return cast("AsyncCollectiveTensor", t).wait()
    return t


def redistribute_like(grad: Tensor, param: Tensor) -> Tensor:
    """Redistribute `grad` to the placement of `param` (collective if the two differ).

    Raises:
        TypeError: the parameter is a DTensor and the gradient is not, so that the placement of the
            gradient is unknown.
    """
    if not is_dtensor(param):
        return full_tensor(grad)
    if not is_dtensor(grad):
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is a DTensor and its gradient is a plain "
            "tensor: say how it is placed with DTensor.from_local(grad, mesh, placements)"
        )
    g, p = cast("DTensor", grad), cast("DTensor", param)
    if g.device_mesh == p.device_mesh and g.placements == p.placements:
        return grad
    return cast(Tensor, g.redistribute(p.device_mesh, p.placements))


def shard_number(t: Tensor) -> int:
    """The index of a DTensor's shard in this process, equal for replicas; 0 for other tensors."""
    if not is_dtensor(t):
        return 0
    d = cast("DTensor", t)
    number = 0
    coordinate = d.device_mesh.get_coordinate() or [0] * d.device_mesh.ndim
    for size, at, placement in zip(d.device_mesh.shape, coordinate, d.placements, strict=True):
        if placement.is_shard():
            number = number * size + at
    return number


MeshPlacement = tuple[Any, tuple[Any, ...]]
"""A device mesh and the placements on it."""


def group_by_placement(params: Sequence[Tensor]) -> list[tuple[MeshPlacement | None, list[int]]]:
    """Group the indices of parameters by placement; None stands for plain tensors."""
    dtensor = _class_of(TENSOR, "DTensor")
    if not any(isinstance(p, dtensor) for p in params):
        return [(None, list(range(len(params))))]
    groups: dict[MeshPlacement | None, list[int]] = {}
    for i, p in enumerate(params):
        placement = None
        if isinstance(p, dtensor):
            d = cast("DTensor", p)
            placement = (d.device_mesh, d.placements)
        groups.setdefault(placement, []).append(i)
    return list(groups.items())


def gather_from_shards(value: Tensor, placement: MeshPlacement | None) -> Tensor:
    """Gather one value for each shard of a placement, [shards] (collective)."""
    if placement is None:
        return value
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, placements = placement
    sharded = [Replicate() if p.is_replicate() else Shard(0) for p in placements]
    return DTensor.from_local(value.reshape(1), mesh, sharded).full_tensor()


def full_tensor(t: Tensor) -> Tensor:
    """The full tensor of a DTensor (collective); any other tensor itself."""
    return cast("DTensor", t).full_tensor() if is_dtensor(t) else t


def has_dtensor(tensors: Sequence[Tensor]) -> bool:
    """Whether a DTensor is among `tensors`; free if there is no process group."""
    set_up = dist.is_available() and dist.is_initialized()
    dtensor = _class_of(TENSOR, "DTensor")
    return set_up and any(issubclass(kind, dtensor) for kind in set(map(type, tensors)))


def is_same_on_all_ranks(values: Sequence[int], like: Tensor) -> bool:
    """Whether all ranks call this with the same values (collective, on the device of `like`)."""
    mark = zlib.crc32(repr(list(values)).encode())
    bounds = torch.tensor([mark, -mark], dtype=torch.int64, device=local(like).device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    largest, smallest = bounds.tolist()
    return bool(largest == -smallest)


def is_parallel() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def device() -> torch.device:
    """The device on which a rank without parameters joins collectives."""
    on_gpu = is_parallel() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def is_flattened(t: Tensor) -> bool:
    """Whether `t` lies in a flat parameter of FSDP1, which is sharded in general."""
    return is_parallel() and getattr(t, "_fsdp_flattened", False)


def max_over_ranks(flag: Tensor) -> None:
    """Set the flag to the largest flag of all ranks, so that all skip a step or none does."""
    if is_parallel():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards `module` or one of its submodules."""
    fsdp_module = _class_of(FSDP, "FSDPModule")
    return any(isinstance(m, fsdp_module) for m in module.modules())


def fsdp_groups(module: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters that `module` itself, and no submodule, has."""
    if not isinstance(module, _class_of(FSDP, "FSDPModule")):
        return []
    state = cast("FSDPModule", module)._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # newer: several
    groups = [state._fsdp_param_group] if groups is None else groups
    return [group for group in groups if group is not None]  # None: it has no parameters


with_local_ascents: weakref.WeakSet[Any] = weakref.WeakSet()
"""DDP modules and groups of FSDP2 that do not average gradients while an optimizer ascends."""


def is_fsdp1(module: nn.Module) -> bool:
    """Whether `module` is wrapped by FSDP1."""
    return isinstance(module, _class_of(FSDP, "FullyShardedDataParallel"))


def averages(module: nn.Module) -> bool:
    """Whether FSDP2, at its defaults, leaves the mean of all processes' gradients."""
    if any(m in with_local_ascents for m in module.modules()):
        return False
    for group in (group for m in module.modules() for group in fsdp_groups(m)):
        synchronized = group.reduce_grads and group.all_reduce_grads
        synchronized = synchronized and group not in with_local_ascents
        if not synchronized or group.gradient_divide_factor is not None:
            return False
    return True


def reshard() -> None:
    """Make FSDP2 gather its parameters again, because gathered copies hold the old values.

    Resharding a sharded module does nothing, so that it is called on every module that is alive.
    """
    for module in _fsdp_modules():
        cast("FSDPModule", module).reshard()


def ids_reduced_in_backward() -> set[int]:
    """Ids of the parameters whose hooks FSDP2 calls with gradients that it has reduced.

    Those that it copies to the host without waiting are left out.
    """
    params = [p for m in _fsdp_modules() for group in fsdp_groups(m) for p in group.fsdp_params]
    return {id(p.sharded_param) for p in params if not (p.offload_to_cpu and p.pin_memory)}


def _fsdp_modules() -> list[nn.Module]:
    """All modules of this process that FSDP2 shards."""
    if not (fsdp_module := _class_of(FSDP, "FSDPModule")):
        return []
    from torch.distributed._composable_state import _module_state_mapping

    return [module for module in list(_module_state_mapping) if isinstance(module, fsdp_module)]


def flat_handles(params: Sequence[Tensor]) -> list[Any]:
    """The handles of FSDP1 for the sharded flat parameters that hold `params`.

    Neither parameters nor torch refer to the handles, so all objects of the process are searched.

    Raises:
        RuntimeError: the garbage collector does not list one of the handles.
    """
    ids = {id(p) for p in params if is_flattened(p)}
    if not ids:
        return []
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    handles = [o for o in gc.get_objects() if issubclass(type(o), FlatParamHandle)]
    matches = [ids.intersection(map(id, params_of_flat(h.flat_param))) for h in handles]
    if ids.difference(*matches):
        raise RuntimeError(
            "FullyShardedDataParallel (FSDP1) has flattened a parameter, and what handles it is "
            "not among the objects of this process, as after gc.freeze(): call gc.unfreeze() "
            "before the optimizer is constructed and before its first step, and gc.freeze() after"
        )
    return [h for h, some in zip(handles, matches, strict=True) if some and h.uses_sharded_strategy]


def params_of_flat(flat: Any) -> list[Tensor]:
    """A flat parameter of FSDP1 and the original parameters in it."""
    originals = (getattr(flat, name, None) or () for name in ("_params", "_shared_params"))
    return [flat, *itertools.chain.from_iterable(originals)]


def reshard_flat(handles: Sequence[Any]) -> None:
    """Make FSDP1 gather its parameters again if a forward pass has left them gathered."""
    for handle in handles:
        is_initialized = hasattr(
            handle.flat_param, "_full_param_padded"
        )  # by the first forward pass
        if is_initialized and handle.uses_sharded_strategy and not handle.needs_unshard():
            handle.reshard(True)
            handle._prefetched = False
