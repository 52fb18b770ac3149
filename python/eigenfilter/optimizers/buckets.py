"""Buckets: the parameters of one group that one kernel call updates together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from eigenfilter import _core, _distributed, kernels
from eigenfilter.optimizers._buffers import BufferStore, conform
from eigenfilter.optimizers._step_counts import CountGroup
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.hyperparameters import check_scalars, is_zero, rho_key

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
        self.kind = kind_of(params[0])
        self.device = _distributed.local(params[0]).device
        self.kernels = kernels.select(self.device, store.backend)
        self.placements = _distributed.group_by_placement(params)
        self.is_distributed = any(placement is not None for placement, _ in self.placements)
        self.is_flat = any(id(p) in store.flat for p in params)
        self.store = store
        self._rho_key = rho_key(group)
        self.count_group: CountGroup | None = None  # of AdamW
        self._lists: dict[str, _core.TensorList] = {}  # backups and buffers by name
        self.first_dtypes: list[torch.dtype] = []  # of the list that first_gradients() returned
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
        """Gradients with their parameters' strides and placements; others are copied."""
        return [conform(g, p) for g, p in zip(grads, self.params, strict=True)]

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
        state_signature: common `Update.state_signature` of their state.
        amp: the loss scale and the flags of the step.
    """

    bucket: ParamBucket
    grads: list[Tensor]
    is_perturbed: bool
    state_signature: Hashable
    amp: AmpState

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


Gradients: TypeAlias = list[tuple[ParamBucket, list[Tensor]]]
"""Buckets, each with a gradient for each of its parameters."""


def gradients_by_id(gradients: Gradients) -> dict[int, Tensor]:
    """The gradients by the ids of their parameters."""
    pairs = (pair for bucket, grads in gradients for pair in zip(bucket.params, grads, strict=True))
    return {id(p): g for p, g in pairs}


def conform_if_needed(gradients: Gradients) -> Gradients:
    """Apply `ParamBucket.conform_if_needed` to every bucket."""
    return [(bucket, bucket.conform_if_needed(grads)) for bucket, grads in gradients]


def kind_of(p: Tensor) -> tuple[torch.device, torch.dtype]:
    """What the parameters of a bucket share."""
    return p.device, p.dtype
