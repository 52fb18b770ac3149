"""Parts: the parameters of one group that one kernel call works on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # imported by torch itself
from torch.nn.parameter import is_lazy

from eigenfilter import _core, _distributed, kernels
from eigenfilter.kernels.conventions import gradient_dtype
from eigenfilter.optimizers._step_counts import Counted

_Key = TypeVar("_Key", bound=Hashable)


class Part:
    """Parameters of one group that share a device and a dtype, with what the kernels need of them.

    Backups belong to the part's `Store` and buffers to the optimizer's state; a part only keeps
    them together in the order of its parameters.
    """

    def __init__(
        self, group: dict[str, Any], number: int, params: list[Tensor], store: Store
    ) -> None:
        self.group = group
        self.number = number  # the group's
        self.params = params
        self.tensors = _core.TensorList(params, trust=True)
        self.kind = _kind(params[0])
        self.device = _distributed.local(params[0]).device
        self.kernels = kernels.select(self.device, store.backend)
        self.placings = _distributed.by_placing(params)
        self.is_distributed = any(placing is not None for placing, _ in self.placings)
        self.is_flat = any(id(p) in store.flat for p in params)
        self.store = store
        self.counted: Counted | None = None  # by an update that depends on the steps taken
        self._lists: dict[str, _core.TensorList] = {}  # by name, of the store or the state
        self.first_dtypes: list[torch.dtype] = []  # of the first gradients' list
        self._past: tuple[int, Hashable] = (-1, None)  # the store's epoch, and what was seen then
        self._subparts: dict[tuple[int, ...], Part] = {}

    def subpart(self, indices: Sequence[int]) -> Part:
        """The part of the parameters at `indices`; itself for all of them."""
        if len(indices) == len(self.params):
            return self
        key = tuple(indices)
        if key not in self._subparts:
            if len(self._subparts) >= 8:  # gradients come and go at random: do not hoard
                self._subparts.clear()
            part = Part(self.group, self.number, [self.params[i] for i in key], self.store)
            for name in set(self._lists).intersection(self.store.keys):
                tensors = self._lists[name]
                part._lists[name] = _core.TensorList(
                    [tensors[i] for i in key], hold=True, trust=True
                )
            self._subparts[key] = part
        return self._subparts[key]

    def split(
        self, grads: list[Tensor], keys: Sequence[_Key]
    ) -> dict[_Key, tuple[Part, list[Tensor]]]:
        """By key: the part of the parameters that have it, with their gradients."""
        indices: dict[_Key, list[int]] = {}
        for i, key in enumerate(keys):
            indices.setdefault(key, []).append(i)
        return {
            key: (self.subpart(some), [grads[i] for i in some]) for key, some in indices.items()
        }

    def backups(self) -> _core.TensorList:
        """The parameters' backups, allocated when first asked for."""
        return self._list("backup", self.store.private)

    def first_gradients(self, grads: Sequence[Tensor]) -> _core.TensorList:
        """Room for the gradients at x, of the dtypes of `grads`, allocated when first asked for."""
        dtypes = [g.dtype for g in grads]
        if dtypes != self.first_dtypes:
            self._lists.pop("first gradient", None)
            self.first_dtypes = dtypes
        rest = iter(dtypes)
        return self._list("first gradient", lambda name, p: self.store.private(name, p, next(rest)))

    def buffers(self, key: str) -> _core.TensorList:
        """The buffers that the optimizer's state has at `key`; missing ones are made, as zeros."""
        if key not in self._lists:
            self._list(key, self.store.buffer)
            self.store.changed()
        return self._lists[key]

    def drop(self, key: str) -> None:
        """Drop the buffers: the step that would have been their first was skipped."""
        del self._lists[key]
        for p in self.params:
            del self.store.state[p][key]
        self.store.changed()

    def pasts(self, of: Callable[[dict[str, Any]], Hashable]) -> list[Hashable]:
        """What `of` makes of each parameter's state; a single item where that is the same."""
        epoch, past = self._past
        if epoch == self.store.epoch:
            return [past]
        found = [of(self.store.state.get(p, {})) for p in self.params]
        if len(set(found)) > 1:
            return found
        self._past = self.store.epoch, found[0]
        return found[:1]

    def save(self) -> None:
        """Copy x to the backups, as the kernel of a first ascent does by itself."""
        torch._foreach_copy_(
            list(self.backups()), [_distributed.local(p).detach() for p in self.params]
        )

    def restore(self) -> None:
        """Go back from the backups to x."""
        locals_ = [_distributed.local(p) for p in self.params]
        torch._foreach_copy_(locals_, list(self.backups()))

    def with_zeros(
        self, grads: Sequence[Tensor | None], like: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """`grads`, with zeros, which share their memory, for None; in the dtypes of `like`, else
        the parameters'."""
        locals_ = [_distributed.local(p).detach() for p in self.params]
        dtypes = [t.dtype for t in (locals_ if like is None else like)]
        rows = list(zip(grads, locals_, dtypes, strict=True))
        most = max((p.numel() for g, p, _ in rows if g is None), default=0)
        made = {dtype for g, _, dtype in rows if g is None}
        zeros = {dtype: torch.zeros(most, dtype=dtype, device=self.device) for dtype in made}
        return [
            zeros[dtype].as_strided(p.shape, p.stride()) if g is None else g for g, p, dtype in rows
        ]

    def conform(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in their parameters' strides and placements, copied where not so.

        Their dtype is the parameter's or, where that does not hold all that theirs does, the next
        wider one, which the kernels read too.
        """
        return [_conform(g, p) for g, p in zip(grads, self.params, strict=True)]

    def conforming(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients, checked, and all conformed where one does not conform."""
        try:
            _core.check(("params", "grads"), (self.tensors, grads), (True, False))
        except (_core.LayoutError, TypeError):
            return self.conform(grads)
        return grads

    def _list(self, name: str, make: Callable[[str, Tensor], Tensor]) -> _core.TensorList:
        if name not in self._lists:
            with torch.inference_mode(False):  # a step outside of it changes them too
                tensors = [make(name, p) for p in self.params]
            self._lists[name] = _core.TensorList(tensors, hold=True, trust=True)
        return self._lists[name]


@dataclass(slots=True)
class Piece:
    """What one kernel call works on: parameters with their gradients that have the same past.

    Attributes:
        part: the parameters.
        grads: a gradient for each.
        moved: whether they are away from x.
        past: what the descent makes of their state.
    """

    part: Part
    grads: list[Tensor]
    moved: bool
    past: Hashable = None


class Store:
    """What outlives the parts of one optimizer: its own tensors, by parameter, and its state.

    Args:
        backend: the kernels' backend.
        keys: where the state has the buffers.
    """

    def __init__(self, backend: str | None, keys: tuple[str, ...]) -> None:
        self.backend = backend
        self.keys = keys
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.epoch = 0  # counts changes of the state's buffers
        self.flat: set[int] = set()  # ids of the parameters that FSDP1 holds in flat shards
        self._private: dict[tuple[str, Tensor], Tensor] = {}
        self._entries: list[dict[str, Any]] = []
        self._values: list[Any] = []
        self._settled = True  # what was noted last is all there is

    def private(self, name: str, p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the optimizer's own like the local memory of a parameter; never saved."""
        local = _distributed.local(p)
        dtype = dtype or local.dtype
        kept = self._private.get((name, p))
        if kept is None or kept.shape != local.shape or not _fits(kept, local, dtype):
            kept = torch.empty_like(local, dtype=dtype, requires_grad=False)
            self._private[name, p] = kept
        return kept

    def buffer(self, key: str, p: Tensor) -> Tensor:
        """A parameter's buffer, made as zeros or brought to its dtype and strides."""
        state = self.state[p]
        buffer: Tensor | None = state.get(key)
        if buffer is None:
            buffer = torch.zeros_like(p, requires_grad=False)
        elif not _distributed.is_dtensor(p) and not _fits(buffer, p, p.dtype):
            buffer = torch.empty_like(p, requires_grad=False).copy_(buffer)
        state[key] = buffer
        return buffer

    def remember(self) -> None:
        """Note which state dictionaries and buffers there are now."""
        self._entries = [s for s in self.state.values() if s]
        self._values = [s.get(key) for s in self._entries for key in self.keys]
        self.epoch += 1
        self._settled = True

    def changed(self) -> None:
        """Have what a step did to the state noted when it ends."""
        self.epoch += 1
        self._settled = False

    def settle(self) -> None:
        """Note it."""
        if not self._settled:
            self.remember()

    def unchanged(self) -> bool:
        """Whether the state is still the one noted: none of it was replaced, cleared or loaded."""
        return not self.keys or (
            self._settled and _core.same_entries(self.state, self._entries, self.keys, self._values)
        )


class Parts:
    """All parts of one optimizer, built from its groups and state and kept while these last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: list[Part] = []
        self.devices: set[torch.device] = set()
        self.are_flat = False  # some of them: shards of FSDP1's flat parameters
        self.flat_handles: list[Any] = []  # FSDP1's, of these
        self.are_shards = False  # some of them, in this way or as DTensors
        self._alone: dict[int, Part] = {}
        self._group_of: dict[int, tuple[dict[str, Any], int]] = {}
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

    def build(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        unify: Callable[[dict[Tensor, Any]], None],
    ) -> None:
        """Build the parts: for each group, one for each device and dtype.

        Args:
            groups, state: the optimizer's.
            unify: brings a state that was loaded to the form in which it is kept.
        """
        self._groups = [(g["params"], list(g["params"])) for g in groups]
        self._store.state = state
        unify(state)
        self._store.remember()
        self._parts = []
        self._alone.clear()
        refuse_overlap(groups)
        self._group_of = {}
        given = [p for group in groups for p in group["params"]]
        self.flat_handles = _distributed.flat_handles(given)
        self._store.flat = {
            id(p) for h in self.flat_handles for p in _distributed.held_by(h.flat_param)
        }
        for number, group in enumerate(groups):
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                by_kind.setdefault(_kind(p), []).append(p)
                self._group_of[id(p)] = group, number
            for params in by_kind.values():
                self._parts.append(Part(group, number, params, self._store))
        self.devices = {part.device for part in self._parts} or {_distributed.device()}
        self.are_flat = any(part.is_flat for part in self._parts)
        self.are_shards = self.are_flat or any(part.is_distributed for part in self._parts)

    def settle(self) -> None:
        """Note what the step that ends did to the state."""
        self._store.settle()

    def alone(self, p: Tensor) -> Part:
        """The part of one parameter."""
        if id(p) not in self._alone:
            group, number = self._group_of[id(p)]
            self._alone[id(p)] = Part(group, number, [p], self._store)
        return self._alone[id(p)]

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
            # A Partial gradient has the local layout of a parameter that every rank has whole.
            if part.is_distributed or _distributed.has_dtensor(cast("list[Tensor]", grads)):
                grads = [
                    _distributed.placed_like(cast(Tensor, g), p)
                    for g, p in zip(grads, part.params, strict=True)
                ]
            found.append((part, grads))
        return cast(Gradients, found)

    def filled(self, found: Gradients, ascends: Callable[[Part], bool]) -> Gradients:
        """`found`, with gradients of zero for the other parameters that require one and ascend."""
        parts = [part for part in self._parts if ascends(part)]
        if parts == [part for part, _ in found]:
            return found
        given = {id(p): g for part, grads in found for p, g in zip(part.params, grads, strict=True)}
        whole = []
        for part in parts:
            some = [i for i, p in enumerate(part.params) if p.requires_grad or id(p) in given]
            if some:
                part = part.subpart(some)
                whole.append((part, part.with_zeros([given.get(id(p)) for p in part.params])))
        return whole


Gradients: TypeAlias = list[tuple[Part, list[Tensor]]]
"""Parts, with a gradient for each of their parameters."""


def conforming(found: Gradients) -> Gradients:
    """`found`, its gradients as `Part.conforming` has them."""
    return [(part, part.conforming(grads)) for part, grads in found]


def refuse_overlap(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for parameters that are not dense, or that share memory: a step would write it twice.

    Parameters without memory (on the meta device, fake, lazy) are left until they have some.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in groups:
        for p in group["params"]:
            if p.device.type != "meta" and not isinstance(p, FakeTensor) and not is_lazy(p):
                by_kind.setdefault(_kind(p), []).append(p)
    for params in by_kind.values():
        _core.check(("params",), (params,), (True,))


def _kind(p: Tensor) -> tuple[torch.device, torch.dtype]:
    return p.device, p.dtype


def _conform(grad: Tensor, param: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise TypeError(
            f"a gradient of shape {tuple(grad.shape)} is sparse ({grad.layout}): use sparse=False "
            "in the module that makes it, or convert it with .to_dense()"
        )
    local, like = _distributed.waited(_distributed.local(grad)), _distributed.local(param)
    if local.shape != like.shape:
        raise ValueError(
            f"a gradient has shape {tuple(local.shape)} on this rank, and its parameter "
            f"{tuple(like.shape)}: both must be placed alike (under FullyShardedDataParallel, "
            "gradients that no_sync() has kept are whole: ascend and step by synchronized ones)"
        )
    dtype = gradient_dtype(like.dtype, local.dtype)
    if _fits(local, like, dtype):
        return local
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(local)


def _fits(t: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    return (
        t.dtype == dtype
        and t.device == like.device
        and t.stride() == like.stride()
        and not t.is_neg()
    )
