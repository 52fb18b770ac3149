"""Buckets: the parameters of one group that one kernel call updates together."""

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
from eigenfilter.optimizers._step_counts import CountGroup

_Key = TypeVar("_Key", bound=Hashable)


class ParamBucket:
    """Parameters of one group that share a device and a dtype, with their tensors for kernels.

    The `BufferStore` owns the backups, and the optimizer's state the buffers. A bucket lists them
    in the order of its parameters.
    """

    def __init__(
        self, group: dict[str, Any], number: int, params: list[Tensor], store: BufferStore
    ) -> None:
        self.group = group
        self.number = number  # of the group in param_groups
        self.params = params
        self.tensors = _core.TensorList(params, trust=True)
        self.kind = _kind(params[0])
        self.device = _distributed.local(params[0]).device
        self.kernels = kernels.select(self.device, store.backend)
        self.placements = _distributed.group_by_placement(params)
        self.is_distributed = any(placement is not None for placement, _ in self.placements)
        self.is_flat = any(id(p) in store.flat for p in params)
        self.store = store
        self.count_group: CountGroup | None = None  # of AdamW
        self._lists: dict[str, _core.TensorList] = {}  # backups and buffers by name
        self.first_dtypes: list[torch.dtype] = []  # of the list that first_gradients() returned
        # The store's epoch in which the common signature of all parameters was computed, and it.
        self._state_signature: tuple[int, Hashable] = (-1, None)
        self._subsets: dict[tuple[int, ...], ParamBucket] = {}

    def subset(self, indices: Sequence[int]) -> ParamBucket:
        """The bucket of the parameters at `indices`; this bucket itself for all of them."""
        if len(indices) == len(self.params):
            return self
        key = tuple(indices)
        if key not in self._subsets:
            if len(self._subsets) >= 8:  # gradients may come and go at random: bound the cache
                self._subsets.clear()
            bucket = ParamBucket(self.group, self.number, [self.params[i] for i in key], self.store)
            for name in set(self._lists).intersection(self.store.keys):
                tensors = self._lists[name]
                bucket._lists[name] = _core.TensorList(
                    [tensors[i] for i in key], hold=True, trust=True
                )
            self._subsets[key] = bucket
        return self._subsets[key]

    def split(
        self, grads: list[Tensor], keys: Sequence[_Key]
    ) -> dict[_Key, tuple[ParamBucket, list[Tensor]]]:
        """For each key the bucket of the parameters that have it, with their gradients."""
        indices: dict[_Key, list[int]] = {}
        for i, key in enumerate(keys):
            indices.setdefault(key, []).append(i)
        return {key: (self.subset(some), [grads[i] for i in some]) for key, some in indices.items()}

    def backups(self) -> _core.TensorList:
        """The backups of the parameters, allocated at the first call."""
        return self._list("backup", self.store.auxiliary)

    def first_gradients(self, grads: Sequence[Tensor]) -> _core.TensorList:
        """Memory for the gradients at x in the dtypes of `grads`, allocated at the first call."""
        dtypes = [g.dtype for g in grads]
        if dtypes != self.first_dtypes:
            self._lists.pop("first gradient", None)
            self.first_dtypes = dtypes
        rest = iter(dtypes)
        return self._list(
            "first gradient", lambda name, p: self.store.auxiliary(name, p, next(rest))
        )

    def buffers(self, key: str) -> _core.TensorList:
        """The state's buffers at `key`; missing ones are created as zeros."""
        if key not in self._lists:
            self._list(key, self.store.buffer)
            self.store.mark_changed()
        return self._lists[key]

    def drop(self, key: str) -> None:
        """Delete the buffers, because the step that created them was skipped."""
        del self._lists[key]
        for p in self.params:
            del self.store.state[p][key]
        self.store.mark_changed()

    def state_signatures(self, of: Callable[[dict[str, Any]], Hashable]) -> list[Hashable]:
        """The value of `of` for each parameter's state; a single item if all are equal."""
        epoch, state_signature = self._state_signature
        if epoch == self.store.epoch:
            return [state_signature]
        signatures = [of(self.store.state.get(p, {})) for p in self.params]
        if len(set(signatures)) > 1:
            return signatures
        self._state_signature = self.store.epoch, signatures[0]
        return signatures[:1]

    def save(self) -> None:
        """Copy x to the backups, as the kernel of a first ascent does."""
        torch._foreach_copy_(
            list(self.backups()), [_distributed.local(p).detach() for p in self.params]
        )

    def restore(self) -> None:
        """Copy the backups to the parameters."""
        locals_ = [_distributed.local(p) for p in self.params]
        torch._foreach_copy_(locals_, list(self.backups()))

    def with_zeros(
        self, grads: Sequence[Tensor | None], like: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Replace None in `grads` by zeros, which share their memory.

        They have the dtypes of `like`, or of the parameters if it is None.
        """
        locals_ = [_distributed.local(p).detach() for p in self.params]
        dtypes = [t.dtype for t in (locals_ if like is None else like)]
        rows = list(zip(grads, locals_, dtypes, strict=True))
        most = max((p.numel() for g, p, _ in rows if g is None), default=0)
        missing_dtypes = {dtype for g, _, dtype in rows if g is None}
        zeros = {
            dtype: torch.zeros(most, dtype=dtype, device=self.device) for dtype in missing_dtypes
        }
        return [
            zeros[dtype].as_strided(p.shape, p.stride()) if g is None else g for g, p, dtype in rows
        ]

    def conform(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients with their parameters' strides and placements; others are copied.

        A copy has the parameter's dtype or, if that does not hold every value of the gradient's
        dtype, the next wider one, which the kernels read too.
        """
        return [_conform(g, p) for g, p in zip(grads, self.params, strict=True)]

    def conform_if_needed(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradients as they are if the kernels accept them; else all of them conformed."""
        try:
            _core.check(("params", "grads"), (self.tensors, grads), (True, False))
        except (_core.LayoutError, TypeError):
            return self.conform(grads)
        return grads

    def _list(self, name: str, make: Callable[[str, Tensor], Tensor]) -> _core.TensorList:
        if name not in self._lists:
            with torch.inference_mode(False):  # steps outside of inference mode write to them too
                tensors = [make(name, p) for p in self.params]
            self._lists[name] = _core.TensorList(tensors, hold=True, trust=True)
        return self._lists[name]


@dataclass(slots=True)
class BucketSlice:
    """The arguments of one kernel call: parameters that are alike, with their gradients.

    Attributes:
        bucket: the parameters.
        grads: a gradient for each parameter.
        is_perturbed: whether the parameters are perturbed.
        state_signature: common `Descent.state_signature` of their state.
    """

    bucket: ParamBucket
    grads: list[Tensor]
    is_perturbed: bool
    state_signature: Hashable = None


class BufferStore:
    """Tensors of one optimizer that outlive its buckets: auxiliary ones, and the state's buffers.

    Args:
        backend: backend of the kernels.
        keys: keys of the buffers in a parameter's state.
    """

    def __init__(self, backend: str | None, keys: tuple[str, ...]) -> None:
        self.backend = backend
        self.keys = keys
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.epoch = 0  # counts changes of the state's buffers
        self.flat: set[int] = set()  # ids of the parameters that FSDP1 holds in flat shards
        self._auxiliary: dict[tuple[str, Tensor], Tensor] = {}
        self._entries: list[dict[str, Any]] = []
        self._values: list[Any] = []
        self._is_snapshot_current = True  # no step has changed the state since the snapshot

    def auxiliary(self, name: str, p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor like a parameter's local memory that never enters the state_dict."""
        local = _distributed.local(p)
        dtype = dtype or local.dtype
        tensor = self._auxiliary.get((name, p))
        if tensor is None or tensor.shape != local.shape or not _fits(tensor, local, dtype):
            tensor = torch.empty_like(local, dtype=dtype, requires_grad=False)
            self._auxiliary[name, p] = tensor
        return tensor

    def buffer(self, key: str, p: Tensor) -> Tensor:
        """The buffer of a parameter, created as zeros or converted to its dtype and strides."""
        state = self.state[p]
        buffer: Tensor | None = state.get(key)
        if buffer is None:
            buffer = torch.zeros_like(p, requires_grad=False)
        elif not _distributed.is_dtensor(p) and not _fits(buffer, p, p.dtype):
            buffer = torch.empty_like(p, requires_grad=False).copy_(buffer)
        state[key] = buffer
        return buffer

    def snapshot_state(self) -> None:
        """Record which state dictionaries and buffers exist now."""
        self._entries = [s for s in self.state.values() if s]
        self._values = [s.get(key) for s in self._entries for key in self.keys]
        self.epoch += 1
        self._is_snapshot_current = True

    def mark_changed(self) -> None:
        """Record that a step has changed the state; its end takes a new snapshot."""
        self.epoch += 1
        self._is_snapshot_current = False

    def snapshot_if_changed(self) -> None:
        """Take a snapshot if a step has changed the state."""
        if not self._is_snapshot_current:
            self.snapshot_state()

    def matches_snapshot(self) -> bool:
        """Whether nothing in the state was replaced, cleared or loaded since the snapshot."""
        return not self.keys or (
            self._is_snapshot_current
            and _core.same_entries(self.state, self._entries, self.keys, self._values)
        )


class ParamBuckets:
    """All buckets of one optimizer, built again when its groups or its state change."""

    def __init__(self, store: BufferStore) -> None:
        self._store = store
        self._buckets: list[ParamBucket] = []
        self.devices: set[torch.device] = set()
        self.are_flat = False  # whether some are shards of flat parameters of FSDP1
        self.flat_handles: list[Any] = []  # of these flat parameters
        self.are_shards = False  # whether some are shards, flat or DTensors
        self._single_buckets: dict[int, ParamBucket] = {}
        self._group_of: dict[int, tuple[dict[str, Any], int]] = {}
        self._groups: list[
            tuple[list[Tensor], list[Tensor]]
        ] = []  # the list of each group, and a copy of it

    def are_current(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether the buckets were built from these groups, parameters and state."""
        return (
            self._store.state is state
            and len(self._groups) == len(groups)
            and all(
                group["params"] is params and _core.same_objects(params, copy)
                for group, (params, copy) in zip(groups, self._groups, strict=True)
            )
            and all(bucket.kind == _kind(bucket.params[0]) for bucket in self._buckets)
            and self._store.matches_snapshot()
        )

    def build(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        normalize_state: Callable[[dict[Tensor, Any]], None],
    ) -> None:
        """Build one bucket for each group, device and dtype.

        Args:
            groups, state: groups and state of the optimizer.
            normalize_state: converts a loaded state to the form that the descent uses.
        """
        self._groups = [(g["params"], list(g["params"])) for g in groups]
        self._store.state = state
        normalize_state(state)
        self._store.snapshot_state()
        self._buckets = []
        self._single_buckets.clear()
        refuse_overlap(groups)
        self._group_of = {}
        params = [p for group in groups for p in group["params"]]
        self.flat_handles = _distributed.flat_handles(params)
        self._store.flat = {
            id(p) for h in self.flat_handles for p in _distributed.params_of_flat(h.flat_param)
        }
        for number, group in enumerate(groups):
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                by_kind.setdefault(_kind(p), []).append(p)
                self._group_of[id(p)] = group, number
            for some in by_kind.values():
                self._buckets.append(ParamBucket(group, number, some, self._store))
        self.devices = {bucket.device for bucket in self._buckets} or {_distributed.device()}
        self.are_flat = any(bucket.is_flat for bucket in self._buckets)
        self.are_shards = self.are_flat or any(bucket.is_distributed for bucket in self._buckets)

    def snapshot_state(self) -> None:
        """Record the changes of a step that ends."""
        self._store.snapshot_if_changed()

    def single(self, p: Tensor) -> ParamBucket:
        """The bucket of one parameter alone."""
        if id(p) not in self._single_buckets:
            group, number = self._group_of[id(p)]
            self._single_buckets[id(p)] = ParamBucket(group, number, [p], self._store)
        return self._single_buckets[id(p)]

    def with_gradients(self) -> Gradients:
        """Buckets of the parameters that have a gradient, with their gradients."""
        gradients = []
        for bucket in self._buckets:
            grads, missing = _core.gradients(bucket.params)
            if missing == len(grads):
                continue
            if missing:
                indices = [i for i, g in enumerate(grads) if g is not None]
                bucket, grads = bucket.subset(indices), [grads[i] for i in indices]
            # A Partial gradient has the local layout of a parameter that every rank has whole.
            if bucket.is_distributed or _distributed.has_dtensor(cast("list[Tensor]", grads)):
                grads = [
                    _distributed.redistribute_like(cast(Tensor, g), p)
                    for g, p in zip(grads, bucket.params, strict=True)
                ]
            gradients.append((bucket, grads))
        return cast(Gradients, gradients)

    def pad_with_zeros(
        self, gradients: Gradients, ascends: Callable[[ParamBucket], bool]
    ) -> Gradients:
        """Add zero gradients for the other parameters that require one and ascend."""
        buckets = [bucket for bucket in self._buckets if ascends(bucket)]
        if buckets == [bucket for bucket, _ in gradients]:
            return gradients
        by_id = {
            id(p): g
            for bucket, grads in gradients
            for p, g in zip(bucket.params, grads, strict=True)
        }
        padded = []
        for bucket in buckets:
            some = [i for i, p in enumerate(bucket.params) if p.requires_grad or id(p) in by_id]
            if some:
                bucket = bucket.subset(some)
                padded.append(
                    (bucket, bucket.with_zeros([by_id.get(id(p)) for p in bucket.params]))
                )
        return padded


Gradients: TypeAlias = list[tuple[ParamBucket, list[Tensor]]]
"""Buckets, each with a gradient for each of its parameters."""


def conform_if_needed(gradients: Gradients) -> Gradients:
    """Apply `ParamBucket.conform_if_needed` to every bucket."""
    return [(bucket, bucket.conform_if_needed(grads)) for bucket, grads in gradients]


def refuse_overlap(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for parameters that are not dense or share memory, which a step would write twice.

    Parameters without memory (on the meta device, fake, lazy) are not checked yet.
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
    local, like = (
        _distributed.wait_for_collective(_distributed.local(grad)),
        _distributed.local(param),
    )
    if local.shape != like.shape:
        raise ValueError(
            f"a gradient has shape {tuple(local.shape)} on this rank, and its parameter "
            f"{tuple(like.shape)}: both must be placed alike (under FullyShardedDataParallel, "
            "gradients that no_sync() has left are whole: ascend and step by synchronized ones)"
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
