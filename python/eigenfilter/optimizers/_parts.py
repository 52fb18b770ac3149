"""Parts: the parameters of one group that one kernel call works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from eigenfilter import _core, kernels
from eigenfilter.optimizers import _distributed

MOMENTUM = "momentum_buffer"
"""Key of the momentum buffer in an optimizer's state, torch.optim.SGD's."""


class Part:
    """Parameters of one group that share a device and a dtype, with what the kernels need of them.

    Backups belong to the part's `Store` and momentum buffers to the optimizer's state; a part only
    keeps them together in the order of its parameters.
    """

    def __init__(self, group: dict[str, Any], params: list[Tensor], store: Store) -> None:
        self.group = group
        self.params = params
        self.tensors = _core.TensorList(params)
        self.kind = _kind(params[0])
        self.device = _distributed.local(params[0]).device
        self.kernels = kernels.select(self.device.type, store.backend)
        self.is_distributed = any(_distributed.is_dtensor(p) for p in params)
        self.store = store
        self._backups: _core.TensorList | None = None
        self._momenta: _core.TensorList | None = None
        self._subparts: dict[tuple[int, ...], Part] = {}

    def subpart(self, indices: Sequence[int]) -> Part:
        """The part of the parameters at `indices`; itself for all of them."""
        if len(indices) == len(self.params):
            return self
        key = tuple(indices)
        if key not in self._subparts:
            if len(self._subparts) >= 8:  # gradients come and go at random: do not hoard
                self._subparts.clear()
            part = Part(self.group, [self.params[i] for i in key], self.store)
            if self._momenta is not None:
                part._momenta = _core.TensorList([self._momenta[i] for i in key], hold=True)
            self._subparts[key] = part
        return self._subparts[key]

    def backups(self) -> _core.TensorList:
        """The parameters' backups, allocated when first asked for."""
        if self._backups is None:
            self._backups = _core.TensorList(map(self.store.backup, self.params), hold=True)
        return self._backups

    def momenta(self) -> _core.TensorList:
        """The momentum buffers; those that are not there yet are made, as zeros."""
        if self._momenta is None:
            self._momenta = _core.TensorList(map(self.store.momentum, self.params), hold=True)
            self.store.remember()
        return self._momenta

    def drop_momenta(self) -> None:
        """Drop the momentum buffers: the step that would have been their first was skipped."""
        self._momenta = None
        for p in self.params:
            del self.store.state[p][MOMENTUM]
        self.store.remember()

    def pieces(self, grads: list[Tensor], moved_parts: list[Part]) -> Iterator[Piece]:
        """Split by what parameters have: are they away from x, have they momentum?"""
        moved = self in moved_parts
        plain = self.group["momentum"] == 0
        if (moved or not moved_parts) and (plain or self._momenta is not None):
            yield Piece(self, grads, moved, True)
            return
        moved_ids = {id(p) for part in moved_parts for p in part.params}
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for i, p in enumerate(self.params):
            begun = plain or self.store.state.get(p, {}).get(MOMENTUM) is not None
            kinds.setdefault((id(p) in moved_ids, begun), []).append(i)
        for (moved, begun), indices in kinds.items():
            yield Piece(self.subpart(indices), [grads[i] for i in indices], moved, begun)

    def restore(self) -> None:
        """Go back from the backups to x."""
        locals_ = [_distributed.local(p) for p in self.params]
        torch._foreach_copy_(locals_, list(self.backups()))

    def conform(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in their parameters' dtype, strides and placements, copied where not so."""
        return [_conform(g, p) for g, p in zip(grads, self.params, strict=True)]


@dataclass(slots=True)
class Piece:
    """What one kernel call steps: parameters with their gradients that have the same past.

    Attributes:
        part: the parameters.
        grads: a gradient for each.
        moved: whether they are away from x.
        begun: whether they have momentum; true where the group takes none.
    """

    part: Part
    grads: list[Tensor]
    moved: bool
    begun: bool


class Store:
    """What outlives the parts of one optimizer: its backups, by parameter, and its state."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._backups: dict[Tensor, Tensor] = {}
        self._seen: tuple[list[Any], list[Any]] = ([], [])

    def backup(self, p: Tensor) -> Tensor:
        """The backup of a parameter's local memory."""
        local = _distributed.local(p)
        kept = self._backups.get(p)
        if kept is None or kept.shape != local.shape or not _fits(kept, local):
            kept = self._backups[p] = torch.empty_like(local, requires_grad=False)
        return kept

    def momentum(self, p: Tensor) -> Tensor:
        """A parameter's momentum buffer, made as zeros or brought to its dtype and strides."""
        state = self.state[p]
        buffer: Tensor | None = state.get(MOMENTUM)
        if buffer is None:
            buffer = torch.zeros_like(p, requires_grad=False)
        elif not _distributed.is_dtensor(p) and not _fits(buffer, p):
            buffer = torch.empty_like(p, requires_grad=False).copy_(buffer)
        state[MOMENTUM] = buffer
        return buffer

    def remember(self) -> None:
        """Note which state dictionaries and momentum buffers there are now."""
        states = [s for s in self.state.values() if s]
        self._seen = states, [s.get(MOMENTUM) for s in states]

    def unchanged(self) -> bool:
        """Whether the state is still the one noted: none of it was replaced, cleared or loaded."""
        return _core.same_entries(self.state, self._seen[0], MOMENTUM, self._seen[1])


class Parts:
    """All parts of one optimizer, built from its groups and state and kept while these last."""

    def __init__(self, backend: str | None) -> None:
        self._store = Store(backend)
        self._parts: list[Part] = []
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []  # each group's list, a copy

    def are_current(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether groups, parameters and state are those the parts were built from."""
        return (
            self._store.state is state
            and len(self._groups) == len(groups)
            and all(
                group["params"] is params and _core.same_objects(params, copy)
                for group, (params, copy) in zip(groups, self._groups, strict=True)
            )
            and all(part.kind == _kind(part.params[0]) for part in self._parts)
            and self._store.unchanged()
        )

    def build(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Build the parts: for each group, one for each device and dtype."""
        self._groups = [(g["params"], list(g["params"])) for g in groups]
        self._store.state = state
        self._store.remember()
        self._parts = []
        self._refuse_overlap()
        for group in groups:
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                by_kind.setdefault(_kind(p), []).append(p)
            self._parts += [Part(group, params, self._store) for params in by_kind.values()]

    def _refuse_overlap(self) -> None:
        """Raise ValueError where parameters of any groups share memory: a move would be two."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for params, _ in self._groups:
            for p in params:
                by_kind.setdefault(_kind(p), []).append(p)
        for params in by_kind.values():
            _core.check(("params",), (params,), (True,))

    def with_gradients(self) -> Gradients:
        """The parts of those parameters that have a gradient."""
        found = []
        for part in self._parts:
            grads, missing = _core.gradients(part.params)
            if missing == len(grads):
                continue
            if missing:
                indices = [i for i, g in enumerate(grads) if g is not None]
                part, grads = part.subpart(indices), [grads[i] for i in indices]
            if part.is_distributed:  # a Partial gradient has a Replicate parameter's local layout
                grads = [
                    _distributed.placed_like(cast(Tensor, g), p)
                    for g, p in zip(grads, part.params, strict=True)
                ]
            found.append((part, grads))
        return cast(Gradients, found)


Gradients: TypeAlias = list[tuple[Part, list[Tensor]]]
"""Parts, with a gradient for each of their parameters."""


def conforming(part: Part, grads: list[Tensor]) -> list[Tensor]:
    """Gradients, checked, and copied to their parameters' layout where one has another."""
    try:
        _core.check(("params", "grads"), (part.tensors, grads), (True, False))
    except (_core.LayoutError, TypeError):
        return part.conform(grads)
    return grads


def _kind(p: Tensor) -> tuple[torch.device, torch.dtype]:
    return p.device, p.dtype


def _conform(grad: Tensor, param: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise TypeError(
            f"a gradient of shape {tuple(grad.shape)} is sparse ({grad.layout}): use sparse=False "
            "in the module that makes it, or convert it with .to_dense()"
        )
    local, like = _distributed.local(grad), _distributed.local(param)
    if _fits(local, like):
        return local
    return torch.empty_like(like, requires_grad=False).copy_(local)


def _fits(t: Tensor, like: Tensor) -> bool:
    return (
        t.dtype == like.dtype
        and t.device == like.device
        and t.stride() == like.stride()
        and not t.is_neg()
    )
