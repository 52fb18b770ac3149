"""The layout of the parameters in buckets, built again when it changes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # imported by torch itself
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from eigenfilter import _core, _distributed
from eigenfilter.optimizers._buffers import BufferStore
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.buckets import (
    BucketSlice,
    Gradients,
    ParamBucket,
    gradients_by_id,
    kind_of,
)
from eigenfilter.optimizers.updates import Update

_Method = TypeVar("_Method", bound=Callable[..., Any])


class ParamBuckets:
    """All buckets of one optimizer, built again when its groups, state or parameters change.

    Args:
        update: the update, which knows the state.
        amp: the loss scale and the flags of its steps.
        backend: backend of the kernels.

    Attributes:
        devices: the devices of the parameters, at least one.
        flat_handles: of the flat parameters that FSDP1 has sharded.
        are_flat: whether some parameters are shards of these.
        are_shards: whether some are shards, flat or DTensors.
        perturbed: the perturbed buckets, each once.
        store: the backups, and the buffers of the state.
    """

    def __init__(self, update: Update, amp: AmpState, backend: str | None) -> None:
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._update = update
        self._amp = amp
        self.store = BufferStore(backend, update.keys)
        self._buckets: list[ParamBucket] = []
        self._single_buckets: dict[int, ParamBucket] = {}
        self._group_of: dict[int, tuple[dict[str, Any], int]] = {}
        # Each group, its list of parameters, and a copy of the list.
        self._groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
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
        self._update.normalize_state(self.store.state)
        self.store.snapshot_state()
        self._buckets = []
        self._single_buckets.clear()
        refuse_overlap(groups)
        self._group_of = {}
        params = [p for group in groups for p in group["params"]]
        self.flat_handles = _distributed.flat_handles(params)
        self.store.flat = {
            id(p) for h in self.flat_handles for p in _distributed.params_of_flat(h.flat_param)
        }
        for number, group in enumerate(groups):
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                by_kind.setdefault(kind_of(p), []).append(p)
                self._group_of[id(p)] = group, number
            for some in by_kind.values():
                self._buckets.append(ParamBucket(group, number, some, self.store))
        self.devices = {bucket.device for bucket in self._buckets} or {_distributed.device()}
        self.are_flat = any(bucket.is_flat for bucket in self._buckets)
        self.are_shards = self.are_flat or any(bucket.is_distributed for bucket in self._buckets)

    def snapshot_state(self) -> None:
        """Record the changes of a step that ends."""
        self.store.snapshot_if_changed()

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
            # A Partial gradient has the local layout of a parameter that every rank has whole.
            if bucket.is_distributed or _distributed.has_dtensor(cast("list[Tensor]", grads)):
                grads = [
                    _distributed.redistribute_like(cast(Tensor, g), p)
                    for g, p in zip(grads, bucket.params, strict=True)
                ]
            gradients.append((bucket, grads))
        return cast(Gradients, gradients)

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
                grads = [by_id.get(id(p)) for p in bucket.params]
                padded.append((bucket, bucket.with_zeros(grads)))
        return padded

    def slices(self, gradients: Gradients, *, by_state: bool) -> list[BucketSlice]:
        """Split buckets by perturbation and, with `by_state`, by state signature."""
        slices = []
        for bucket, grads in gradients:
            signatures = (
                bucket.state_signatures(self._update.state_signature) if by_state else [None]
            )
            is_uniform = not self.perturbed or bucket in self.perturbed
            if is_uniform and len(signatures) == 1:
                slices.append(self._slice(bucket, grads, bool(self.perturbed), signatures[0]))
                continue
            perturbed_ids = self.perturbed_ids()
            signatures = signatures * (len(bucket.params) // len(signatures))
            pairs = zip(bucket.params, signatures, strict=True)
            keys = [(id(p) in perturbed_ids, signature) for p, signature in pairs]
            for key, (subset, some) in bucket.split(grads, keys).items():
                slices.append(self._slice(subset, some, *key))
        return slices

    def single(self, p: Tensor) -> BucketSlice:
        """The slice of one parameter alone, which has a gradient."""
        if id(p) not in self._single_buckets:
            group, number = self._group_of[id(p)]
            self._single_buckets[id(p)] = ParamBucket(group, number, [p], self.store)
        bucket = self._single_buckets[id(p)]
        [signature] = bucket.state_signatures(self._update.state_signature)
        is_perturbed = id(p) in self.perturbed_ids()
        return self._slice(bucket, [cast(Tensor, p.grad)], is_perturbed, signature)

    def _slice(
        self, bucket: ParamBucket, grads: list[Tensor], is_perturbed: bool, signature: Hashable
    ) -> BucketSlice:
        return BucketSlice(bucket, grads, is_perturbed, signature, self._amp)

    # Perturbation.

    def perturbed_ids(self) -> set[int]:
        """Ids of the parameters that are perturbed."""
        if self._perturbed_ids is None:
            self._perturbed_ids = {id(p) for bucket in self.perturbed for p in bucket.params}
        return self._perturbed_ids

    def mark_perturbed(self, bucket: ParamBucket) -> None:
        """Record that a kernel is about to save and to perturb the parameters of a bucket."""
        bucket.backups().filled = False  # until the kernel has written them
        self.perturbed.append(bucket)
        self._perturbed_ids = None

    def forget_perturbed(self) -> list[ParamBucket]:
        """Record that no parameter is perturbed any more; return the buckets that were."""
        buckets, self.perturbed, self._perturbed_ids = self.perturbed, [], None
        return buckets

    def restore(
        self,
        without: Sequence[tuple[ParamBucket, object]] = (),
        except_ids: set[int] | frozenset[int] = frozenset(),
    ) -> None:
        """Restore the perturbed parameters, except those of buckets and with ids to leave out."""
        done = {id(bucket) for bucket, _ in without}
        buckets = [b for b in self.perturbed if id(b) not in done and b.backups().filled]
        if buckets and (without or except_ids):
            ids = except_ids.union(id(p) for bucket, _ in without for p in bucket.params)
            remaining = [
                (bucket, [i for i, p in enumerate(bucket.params) if id(p) not in ids])
                for bucket in buckets
            ]
            buckets = [bucket.subset(indices) for bucket, indices in remaining if indices]
        for bucket in buckets:
            bucket.restore()
        self.mark_written(buckets)

    def mark_written(self, buckets: Sequence[ParamBucket]) -> None:
        """Tell autograd and FSDP that the parameters of `buckets` have changed."""
        for bucket in buckets:
            increment_version(bucket.params)
        if any(bucket.is_distributed for bucket in buckets):
            _distributed.reshard()
        if self.are_flat:
            _distributed.reshard_flat(self.flat_handles)


def retry_on_layout_change(method: _Method) -> _Method:
    """Make a method build the buckets of its object again on a LayoutError, and run once more.

    `model.to(dtype)` and `model.to(memory_format=...)` change parameters in place. The kernels
    notice before they write. Only a call that begins at x and has written nothing is repeated.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        buckets: ParamBuckets = self._buckets
        buckets.store.has_written = False
        began_perturbed = bool(buckets.perturbed)  # an error restores x before it gets here
        try:
            return method(self, *args)
        except _core.LayoutError:
            if began_perturbed or buckets.store.has_written or buckets.perturbed:
                raise
            buckets.build()
            return method(self, *args)

    return cast(_Method, call)


def refuse_overlap(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for parameters that are not dense or share memory, which a step would write twice.

    Parameters without memory (on the meta device, fake, lazy) are not checked yet.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in groups:
        for p in group["params"]:
            if p.device.type != "meta" and not isinstance(p, FakeTensor) and not is_lazy(p):
                by_kind.setdefault(kind_of(p), []).append(p)
    for params in by_kind.values():
        _core.check(("params",), (params,), (True,))
