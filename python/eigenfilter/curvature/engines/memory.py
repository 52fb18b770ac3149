"""How much memory graphs hold, and how much there is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eigenfilter.curvature.loss.autograd_graph import kept

_SHARE = 0.5  # of what is free, that graphs may take by default


def default_budget(device: torch.device) -> int:
    """Return half of what is free on `device`, in bytes."""
    if device.type == "cpu":
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        return int(_SHARE * 1024 * free)
    module = torch.get_device_module(device)
    free = module.mem_get_info(device)[0]
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return int(_SHARE * (free + cached))


def graph_bytes(roots: Iterable[Tensor], given: Iterable[Tensor]) -> int:
    """Return the bytes that the graph behind `roots` keeps alive, without the tensors `given`."""
    seen = {t.untyped_storage()._cdata for t in given}
    total = 0
    for t in kept(roots):
        if t.layout != torch.strided:
            continue
        storage = t.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
