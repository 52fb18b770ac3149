"""Slices of vectors over processes, as FSDP2 shards the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eigenfilter import _distributed

_WAYS_OUT = (
    "build the operator on an unsharded copy of the model, and share the data out by process_group"
)


class ShardSlices:
    """The slices that FSDP2's shards form: each process holds its shards, one after another.

    Attributes:
        number: index of this process's slice within a vector.
        count: number of slices of a vector.
        length: length of this process's slice.
        processes: number of processes that hold data. With replicas, several hold the same slice.
        leads: whether this process is the first of them.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        """Read how `params`, DTensors, are sharded.

        Raises:
            ValueError: they are not all on one mesh, along the same dimension of it.
        """
        placements = {
            (p.device_mesh, tuple(a.is_shard() for a in p.placements))
            for p in params
            if isinstance(p, dist.tensor.DTensor)
        }
        if len(placements) != 1 or not all(map(_distributed.is_dtensor, params)):
            raise ValueError(
                f"parameters must be sharded all alike, or whole: {_WAYS_OUT}; or leave those that "
                "differ out of params"
            )
        ((self._mesh, sharded),) = placements
        if sum(sharded) != 1:
            raise ValueError(
                f"parameters must be sharded along one dimension of a mesh, not {sum(sharded)}: "
                f"{_WAYS_OUT}"
            )
        along = sharded.index(True)
        self._group = self._mesh.get_group(along)
        self._device = _distributed.local(params[0]).device
        self.number = self._mesh.get_local_rank(along)
        self.count = self._mesh.size(along)
        self.length = sum(_distributed.local(p).numel() for p in params)
        self.processes = self._mesh.size()
        self.leads = dist.get_rank() == int(self._mesh.mesh.flatten()[0])

    def sum(self, t: Tensor) -> Tensor:
        """Sum t over the slices in place, to the same bits in every process, and return it."""
        return self._all_reduce(t, self._group)

    def sum_of_all(self, value: float) -> float:
        """Return the sum of a number over all processes, including replicas."""
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        for dimension in range(self._mesh.ndim):
            self._all_reduce(total, self._mesh.get_group(dimension))
        return float(total)

    def spans(self, group: dist.ProcessGroup) -> bool:
        """Whether a group has the same processes as the mesh."""
        return dist.get_process_group_ranks(group) == self._mesh.mesh.flatten().sort()[0].tolist()

    def _all_reduce(self, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        on_device = t.to(self._device)  # t is on the host if the basis is
        dist.all_reduce(on_device, group=group)
        return t if on_device is t else t.copy_(on_device)


def slices_of(model: nn.Module, params: Sequence[Tensor]) -> ShardSlices | None:
    """Return the slices of FSDP2's shards; None if all parameters are whole.

    Raises:
        ValueError: they are sharded in a way that `ShardSlices` does not support, or not by FSDP2.
    """
    if not any(map(_distributed.is_dtensor, params)):
        return None
    if not _distributed.is_fsdp(model):
        raise ValueError(f"DTensor parameters must be FSDP2's: {_WAYS_OUT}")
    return ShardSlices(params)
