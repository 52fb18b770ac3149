"""How much memory graphs hold, and how much there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from eigenfilter.curvature.engines.graphs import nodes

_SHARE = 0.5  # of what is free, that graphs may take by default
_known: dict[type, tuple[str, ...]] = {}


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
    for t in [*roots, *(t for node in nodes(list(roots)) for t in _saved(node))]:
        storage = t.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def _saved(node: Any) -> Iterator[Tensor]:
    for name in _attributes(type(node)):
        value = getattr(node, name)
        yield from (t for t in (value if isinstance(value, tuple) else (value,)) if _stored(t))


def _attributes(kind: type) -> tuple[str, ...]:
    """Return the names under which nodes of a kind show the tensors they saved."""
    if kind not in _known:
        shown = [name for name in dir(kind) if name.startswith("_saved_")]
        if issubclass(kind, torch.autograd.function.BackwardCFunction):
            shown.append("saved_tensors")
        _known[kind] = tuple(shown)
    return _known[kind]


def _stored(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
