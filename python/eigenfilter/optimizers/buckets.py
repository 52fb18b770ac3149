"""Buckets: the parameters of one group that one kernel call updates together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eigenfilter import _core, _distributed, kernels
from eigenfilter.kernels.compression import CODES
from eigenfilter.optimizers._buffers import BufferStore, conform, kind_of, refuse_overlap
from eigenfilter.optimizers._compression import CORRECTION, Formats, scale_key
from eigenfilter.optimizers._step_counts import CountGroup
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.hyperparameters import check_scalars, is_zero, rho_key

if TYPE_CHECKING:
    from eigenfilter.optimizers.updates import Update

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Directions:
    """Parameters, and what each is moved along.

    Attributes:
        params: the parameters.
        tensors: for each the update, or the codes that stand for it.
        scales: those of the codes, or None.
    """

    params: Sequence[Tensor]
    tensors: Sequence[Tensor]
    scales: Sequence[Tensor] | None = None


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
        self.kind = kind_of(params[0])
        self.device = _distributed.local(params[0]).device
        self.kernels = kernels.select(self.device, store.backend)
        self.placements = _distributed.group_by_placement(params)
        self.is_distributed = any(placement is not None for placement, _ in self.placements)
        self.is_flat = any(id(p) in store.flat for p in params)
        self.store = store
        self.count_group: CountGroup | None = None  # of AdamW
        self.first_dtypes: list[torch.dtype] = []  # of the list that first_gradients() returned
        self._rho_key = rho_key(group)
        self._lists: dict[str, _core.TensorList] = {}  # backups and buffers by name
        # The store's epoch in which the common signature of all parameters was computed, and it.
        self._state_signature: tuple[int, Hashable] = (-1, None)
        self._subsets: dict[tuple[int, ...], ParamBucket] = {}

    @property
    def ascends(self) -> bool:
        """Whether the parameters have a radius other than the number 0."""
        return not is_zero(self.rho)

    @property
    def rho(self) -> float | Tensor:
        """The radius of the group's ascent."""
        rho: float | Tensor = self.group.get(self._rho_key, 0.0)
        return rho

    @property
    def signed_rho(self) -> float | Tensor:
        """The step size of an ascent: rho, or -rho with `maximize`."""
        return -self.rho if self.group.get("maximize") else self.rho

    # Parts.

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
                tensors = [self._lists[name][i] for i in key]
                bucket._lists[name] = _core.TensorList(tensors, hold=True, trust=True)
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

    # Backups and state.

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

    def scales(self, key: str) -> _core.TensorList | None:
        """The scales of the buffers at `key`, where these are codes."""
        self.buffers(key)
        if self.store.formats.dtype(key, self.params[0]) not in CODES:
            return None
        state, name = self.store.state, scale_key(key)
        return self._list(name, lambda _, p: cast(Tensor, state[p][name]))

    @property
    def has_masters(self) -> bool:
        """Whether the parameters have corrections that make master weights of them."""
        return self.store.formats.correction(self.params[0]) is not None

    def corrections(self) -> _core.TensorList | None:
        """The corrections of the parameters, where they have any."""
        return self.buffers(CORRECTION) if self.has_masters else None

    def like_params(self, key: str) -> _core.TensorList | None:
        """The buffers at `key`, where they are like the parameters."""
        buffers = self.buffers(key)
        return buffers if self.store.formats.dtype(key, self.params[0]) == self.kind[1] else None

    def move(
        self,
        along: Directions,
        alpha: float | Tensor,
        *,
        found_inf: Tensor | None = None,
    ) -> None:
        """Move parameters by alpha along tensors; their master weights, where there are any.

        Without masters the sum is rounded to the parameters' dtype.
        """
        corrections: Sequence[Tensor] | None = self.corrections()
        if corrections is not None and along.params is not self.tensors:
            corrections = [self.store.state[p][CORRECTION] for p in along.params]
        self.kernels.perturb(
            along.params,
            along.tensors,
            None,
            alpha,
            corrections=corrections,
            momentum_scales=along.scales,
            save=False,
            found_inf=found_inf,
        )

    def along(self, key: str) -> Directions:
        """The buffers at `key` as directions of all parameters."""
        return Directions(self.tensors, self.buffers(key), self.scales(key))

    def lacks_corrections(self) -> bool:
        """Whether the first call of `corrections` has some to create."""
        return self.has_masters and CORRECTION not in self._lists

    def _list(self, name: str, make: Callable[[str, Tensor], Tensor]) -> _core.TensorList:
        if name not in self._lists:
            with torch.inference_mode(False):  # steps outside of inference mode write to them too
                tensors = [make(name, p) for p in self.params]
            self._lists[name] = _core.TensorList(tensors, hold=True, trust=True)
        return self._lists[name]

    def drop(self, key: str) -> None:
        """Delete the buffers, because the step that created them was skipped."""
        for name in (key, scale_key(key)):
            self._lists.pop(name, None)
            for p in self.params:
                self.store.state[p].pop(name, None)
        self.store.mark_changed()

    def state_signatures(self, update: Update) -> list[Hashable]:
        """The signature of each parameter's state; a single item if all are equal.

        It is cached only where the signatures stay equal until the epoch changes.
        """
        epoch, state_signature = self._state_signature
        if epoch == self.store.epoch:
            return [state_signature]
        states = [self.store.state.get(p, {}) for p in self.params]
        signatures = list(map(update.state_signature, states))
        if len(set(signatures)) > 1:
            return signatures
        if update.change_together(states):
            self._state_signature = self.store.epoch, signatures[0]
        return signatures[:1]

    def save(self) -> None:
        """Copy x to the backups, as the kernel of a first ascent does."""
        torch._foreach_copy_(list(self.backups()), self._locals())

    def restore(self) -> None:
        """Copy the backups to the parameters."""
        torch._foreach_copy_(self._locals(), list(self.backups()))

    def _locals(self) -> list[Tensor]:
        return [_distributed.local(p).detach() for p in self.params]

    # Gradients.

    def with_zeros(
        self, grads: Sequence[Tensor | None], like: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Replace None in `grads` by zeros, which share their memory.

        They have the dtypes of `like`, or of the parameters if it is None.
        """
        params = self._locals()
        rows = list(zip(grads, params, params if like is None else like, strict=True))
        most = max((p.numel() for g, p, _ in rows if g is None), default=0)
        widest = max((t.dtype for _, _, t in rows), key=lambda dtype: dtype.itemsize)
        zeros = torch.zeros(most, dtype=widest, device=self.device)
        return [
            zeros.view(t.dtype).as_strided(p.shape, p.stride()) if g is None else g
            for g, p, t in rows
        ]

    def conform(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients with their parameters' strides and placements; others are copied."""
        return [conform(g, p) for g, p in zip(grads, self.params, strict=True)]

    def conform_if_needed(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradients as they are if the kernels accept them; else all of them conformed."""
        try:
            _core.check(("params", "grads"), (self.tensors, grads), (True, False))
        except (_core.LayoutError, TypeError):
            return self.conform(grads)
        return grads


Gradients: TypeAlias = list[tuple[ParamBucket, list[Tensor]]]
"""Buckets, each with a gradient for each of its parameters."""


def gradients_by_id(gradients: Gradients) -> dict[int, Tensor]:
    """The gradients by the ids of their parameters."""
    pairs = (pair for bucket, grads in gradients for pair in zip(bucket.params, grads, strict=True))
    return {id(p): g for p, g in pairs}


def conform_if_needed(gradients: Gradients) -> Gradients:
    """Apply `ParamBucket.conform_if_needed` to every bucket."""
    return [(bucket, bucket.conform_if_needed(grads)) for bucket, grads in gradients]


@dataclass(slots=True)
class BucketSlice:
    """The arguments of one kernel call: parameters that are alike, with their gradients.

    Attributes:
        bucket: the parameters.
        grads: a gradient for each parameter.
        amp: the loss scale and the flags of the step.
        is_perturbed: whether the parameters are perturbed.
        state_signature: common `Update.state_signature` of their state.
    """

    bucket: ParamBucket
    grads: list[Tensor]
    amp: AmpState
    is_perturbed: bool
    state_signature: Hashable

    def check(self) -> None:
        """Check hyperparameters, and conform gradients, before the first of several calls."""
        check_scalars(self.bucket.group, self.bucket.device)
        self.grads = self.bucket.conform_if_needed(self.grads)

    def launch(self, kernel: Callable[..., None], *args: Any, **options: Any) -> None:
        """Call a kernel on the slice; copy gradients whose layout is not the parameters'.

        Args:
            kernel: one of `bucket.kernels` that takes parameters and gradients first.
            args, options: its further arguments, except the loss scale and the flag.
        """
        bucket = self.bucket
        options |= self.amp.scalars(bucket.device)
        try:
            kernel(bucket.tensors, self.grads, *args, **options)
        except (_core.LayoutError, TypeError):
            kernel(bucket.tensors, bucket.conform(self.grads), *args, **options)
        bucket.store.has_written = True


class ParamBuckets:
    """All buckets of one optimizer, built again when its groups, state or parameters change.

    Args:
        update: the update, which knows the state.
        amp: the loss scale and the flags of its steps.
        backend: backend of the kernels.
        formats: how the state is held.

    Attributes:
        groups: the groups of the parameters.
        devices: the devices of the parameters, at least one.
        flat_handles: of the flat parameters that FSDP1 has sharded.
        are_flat: whether some parameters are shards of these.
        are_shards: whether some are shards, flat or DTensors.
        perturbed: the perturbed buckets, each once.
        store: the backups, and the buffers of the state.
    """

    def __init__(
        self, update: Update, amp: AmpState, backend: str | None, formats: Formats
    ) -> None:
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._update = update
        self._amp = amp
        keys = (*update.keys, *formats.keys(update.moments))
        self.store = BufferStore(backend, keys, formats)
        self._buckets: list[ParamBucket] = []
        # Each group, its list of parameters, and a copy of the list.
        self._groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
        self.groups: list[dict[str, Any]] = []
        self.devices: set[torch.device] = set()
        self.flat_handles: list[Any] = []
        self.are_flat = self.are_shards = False
        self.perturbed: list[ParamBucket] = []
        self._perturbed_ids: set[int] | None = None

    # Layout.

    def refresh(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Build the buckets again if groups, parameters or state have changed.

        Args:
            optimizer: the one that has them; None for that of the last call. It is not kept alive.

        Raises:
            RuntimeError: the parameters are perturbed.
        """
        if optimizer is not None:
            self._optimizer = weakref.ref(optimizer)
        if self._are_current() and not self._update.has_edits():
            return
        if self.perturbed:
            raise RuntimeError(
                "param_groups or state were changed between an ascent and its step: change them "
                "after step() or restore()"
            )
        self.build()

    def _owner(self) -> torch.optim.Optimizer:
        owner = None if self._optimizer is None else self._optimizer()
        assert owner is not None
        return owner

    def _are_current(self) -> bool:
        """Whether the buckets were built from the present groups, parameters and state."""
        groups = self._owner().param_groups
        return (
            self.store.state is self._owner().state
            and len(self._groups) == len(groups)
            and all(
                group is known and group["params"] is params and _core.same_objects(params, copy)
                for group, (known, params, copy) in zip(groups, self._groups, strict=True)
            )
            and all(bucket.kind == kind_of(bucket.params[0]) for bucket in self._buckets)
            and self.store.matches_snapshot()
        )

    def build(self) -> None:
        """Build one bucket for each group, device and dtype."""
        groups, self.store.state = self._owner().param_groups, self._owner().state
        self._groups = [(g, g["params"], list(g["params"])) for g in groups]
        self.groups = list(groups)
        self._update.normalize_state(self.store.state)
        self.store.snapshot_state()
        self._buckets = []
        refuse_overlap(groups)
        self.flat_handles = _distributed.flat_handles([p for g in groups for p in g["params"]])
        self.store.flat = {
            id(p) for h in self.flat_handles for p in _distributed.params_of_flat(h.flat_param)
        }
        for number, group in enumerate(groups):
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                by_kind.setdefault(kind_of(p), []).append(p)
            self._buckets += [ParamBucket(group, number, p, self.store) for p in by_kind.values()]
        self.devices = {bucket.device for bucket in self._buckets} or {_distributed.device()}
        self.are_flat = any(bucket.is_flat for bucket in self._buckets)
        self.are_shards = self.are_flat or any(bucket.is_distributed for bucket in self._buckets)

    @property
    def built(self) -> Sequence[ParamBucket]:
        """The buckets, in a new list after each `build`."""
        return self._buckets

    # Gradients, and the arguments of kernel calls.

    def with_gradients(self, optimizer: torch.optim.Optimizer) -> Gradients:
        """Refreshed buckets of the parameters that have a gradient, with their gradients."""
        self.refresh(optimizer)
        gradients = []
        for bucket in self._buckets:
            grads, missing = _core.gradients(bucket.params)
            if missing == len(grads):
                continue
            if missing:
                indices = [i for i, g in enumerate(grads) if g is not None]
                bucket, grads = bucket.subset(indices), [grads[i] for i in indices]
            gradients.append((bucket, placed_as_params(bucket, cast("list[Tensor]", grads))))
        return gradients

    def pad_with_zeros(self, gradients: Gradients) -> Gradients:
        """Add zero gradients for the other parameters that require one and ascend."""
        buckets = [bucket for bucket in self._buckets if bucket.ascends]
        if buckets == [bucket for bucket, _ in gradients]:
            return gradients
        by_id = gradients_by_id(gradients)
        padded = []
        for bucket in buckets:
            some = [i for i, p in enumerate(bucket.params) if p.requires_grad or id(p) in by_id]
            if some:
                bucket = bucket.subset(some)
                padded.append(
                    (bucket, bucket.with_zeros([by_id.get(id(p)) for p in bucket.params]))
                )
        return padded

    def slices(self, gradients: Gradients, *, by_state: bool) -> list[BucketSlice]:
        """Split buckets by perturbation and, with `by_state`, by state signature."""
        slices = []
        for bucket, grads in gradients:
            signatures = bucket.state_signatures(self._update) if by_state else [None]
            is_uniform = not self.perturbed or bucket in self.perturbed
            if is_uniform and len(signatures) == 1:
                is_perturbed = bool(self.perturbed)
                slices.append(BucketSlice(bucket, grads, self._amp, is_perturbed, signatures[0]))
                continue
            perturbed_ids = self.perturbed_ids()
            signatures = signatures * (len(bucket.params) // len(signatures))
            pairs = zip(bucket.params, signatures, strict=True)
            keys = [(id(p) in perturbed_ids, signature) for p, signature in pairs]
            for key, (subset, some) in bucket.split(grads, keys).items():
                slices.append(BucketSlice(subset, some, self._amp, *key))
        return slices

    def by_state(self) -> list[tuple[ParamBucket, Hashable]]:
        """All buckets, split by state signature, with it."""
        split = []
        for bucket in self._buckets:
            signatures = bucket.state_signatures(self._update)
            if len(signatures) == 1:
                split.append((bucket, signatures[0]))
                continue
            parts = bucket.split(bucket.params, signatures)
            split += [(subset, signature) for signature, (subset, _) in parts.items()]
        return split

    # Perturbation.

    def perturbed_ids(self) -> set[int]:
        """Ids of the parameters that are perturbed."""
        if self._perturbed_ids is None:
            self._perturbed_ids = {id(p) for bucket in self.perturbed for p in bucket.params}
        return self._perturbed_ids

    def perturb(self, gradients: Gradients, perturb: Callable[[BucketSlice], None]) -> None:
        """Perturb parameters slice by slice, and record it."""
        for bucket_slice in self.slices(gradients, by_state=False):
            backups = bucket_slice.bucket.backups()
            if not bucket_slice.is_perturbed:
                backups.filled = False  # until the kernel has written them
                self._mark_perturbed(bucket_slice.bucket)
            perturb(bucket_slice)
            # The compiled kernels have noted it in the call itself, so that no interrupt can come
            # between; the other backends leave it to this line.
            backups.filled = True

    def _mark_perturbed(self, bucket: ParamBucket) -> None:
        self.perturbed.append(bucket)
        if self._perturbed_ids is not None:
            self._perturbed_ids.update(map(id, bucket.params))

    def end_step(self) -> None:
        """Record that no parameter is perturbed any more, and what the step has changed."""
        self.perturbed, self._perturbed_ids = [], None
        self.store.snapshot_if_changed()

    def restore(self, without: Gradients | None = None, except_ids: set[int] | None = None) -> None:
        """Restore the perturbed parameters, except those of buckets and with ids to leave out."""
        done = [bucket for bucket, _ in without or ()]
        buckets = [b for b in self.perturbed if b not in done and b.backups().filled]
        if buckets and (done or except_ids):
            ids = {id(p) for bucket in done for p in bucket.params} | (except_ids or set())
            rest = [[i for i, p in enumerate(b.params) if id(p) not in ids] for b in buckets]
            buckets = [b.subset(some) for b, some in zip(buckets, rest, strict=True) if some]
        for bucket in buckets:
            bucket.restore()
        self.mark_written(buckets)

    def mark_written(self, buckets: Sequence[ParamBucket], *, in_backward: bool = False) -> None:
        """Tell autograd and FSDP that the parameters of `buckets` have changed.

        Within a backward pass, FSDP must not be told yet: it still uses what it has gathered.
        """
        for bucket in buckets:
            increment_version(bucket.params)
        torch.clear_autocast_cache()  # an outer autocast keeps copies of the parameters
        if in_backward:
            return
        if any(bucket.is_distributed for bucket in buckets):
            _distributed.reshard()
        if self.are_flat:
            _distributed.reshard_flat(self.flat_handles)


def placed_as_params(bucket: ParamBucket, grads: list[Tensor]) -> list[Tensor]:
    """The gradients of a bucket, placed as its parameters are.

    A Partial gradient has the local layout of a parameter that every rank has whole.
    """
    if bucket.is_distributed or _distributed.has_dtensor(grads):
        return list(map(_distributed.redistribute_like, grads, bucket.params))
    return grads
