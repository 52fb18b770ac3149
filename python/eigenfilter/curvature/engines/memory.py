"""The memory that graphs keep alive, and the memory that is free."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eigenfilter.curvature.loss.autograd_graph import Root, saved_tensors

_SHARE = 0.5  # the part of free memory that graphs may take by default


def default_budget(device: torch.device) -> int:
    """Return half of the free memory of `device`, in bytes."""
    if device.type == "cpu":
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        return int(_SHARE * 1024 * free)
    module = torch.get_device_module(device)
    free = module.mem_get_info(device)[0]
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return int(_SHARE * (free + cached))


def graph_bytes(roots: Iterable[Root], excluded: Iterable[Tensor]) -> int:
    """Return the bytes that the graph behind `roots` keeps alive, without those of `excluded`."""
    counted = {t.untyped_storage()._cdata for t in excluded}
    total = 0
    for t in saved_tensors(roots):
        if t.layout != torch.strided:
            continue
        storage = t.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            total += storage.nbytes()
    return total
