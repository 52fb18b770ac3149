"""Parts: the parameters of one group that one kernel call works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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
            self._subparts[key] = Part(self.group, [self.params[i] for i in key], self.store)
        return self._subparts[key]

    def backups(self) -> _core.TensorList:
        """The parameters' backups, allocated when first asked for."""
        if self._backups is None:
            self._backups = _core.TensorList([self.store.backup(p) for p in self.params])
        return self._backups

    @property
    def has_momenta(self) -> bool:
        """Whether every parameter is known to have a momentum buffer."""
        return self._momenta is not None

    def has_momentum(self, p: Tensor) -> bool:
        """Whether a parameter has a momentum buffer."""
        return self.store.state.get(p, {}).get(MOMENTUM) is not None

    def momenta(self) -> _core.TensorList:
        """The momentum buffers; those that are not there yet are made, as zeros."""
        if self._momenta is None:
            self._momenta = _core.TensorList([self.store.momentum(p) for p in self.params])
            self.store.remember()
        return self._momenta

    def drop_momenta(self) -> None:
        """Drop the momentum buffers: the step that would have been their first was skipped."""
        self._momenta = None
        for p in self.params:
            del self.store.state[p][MOMENTUM]
        self.store.remember()

    def conform(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in the dtype, strides and placements of their parameters, copied where not so."""
        return [_conform(g, p) for g, p in zip(grads, self.params, strict=True)]


class Store:
    """What outlives the parts of one optimizer: its backups, by parameter, and its state."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._backups: dict[Tensor, Tensor] = {}
        self._seen: tuple[list[Any], list[Any]] = ([], [])

    def backup(self, p: Tensor) -> Tensor:
        """The backup of a parameter's local memory."""
        local = _distributed.local(p).detach()
        kept = self._backups.get(p)
        if kept is None or kept.dtype != local.dtype or kept.device != local.device:
            kept = self._backups[p] = torch.empty_like(local)
        return kept

    def momentum(self, p: Tensor) -> Tensor:
        """A parameter's momentum buffer, made as zeros or brought to its dtype and strides."""
        state = self.state[p]
        buffer: Tensor | None = state.get(MOMENTUM)
        if buffer is None:
            buffer = torch.zeros_like(p, requires_grad=False)
        elif not _distributed.is_dtensor(p):
            like = torch.empty_like(p, requires_grad=False)
            if not fits(buffer, like):
                buffer = like.copy_(buffer)
        state[MOMENTUM] = buffer
        return buffer

    def remember(self) -> None:
        """Note which state dictionaries and momentum buffers there are now."""
        states = list(self.state.values())
        self._seen = states, [s.get(MOMENTUM) for s in states]

    def unchanged(self) -> bool:
        """Whether the state is still the one noted: nobody replaced, cleared or loaded any of it."""
        return _core.same_entries(self.state, self._seen[0], MOMENTUM, self._seen[1])


def split(groups: Sequence[dict[str, Any]], store: Store) -> Iterator[Part]:
    """Yield the parts of all groups: per group, one for each device and dtype."""
    for group in groups:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in group["params"]:
            by_kind.setdefault((p.device, p.dtype), []).append(p)
        for params in by_kind.values():
            yield Part(group, params, store)


def _conform(grad: Tensor, param: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise TypeError(
            f"a gradient of shape {tuple(grad.shape)} is sparse ({grad.layout}): use sparse=False "
            "in the module that makes it, or convert it with .to_dense()"
        )
    grad = _distributed.placed_like(grad, param)
    local, like = _distributed.local(grad), _distributed.local(param)
    out = torch.empty_like(like, requires_grad=False)
    return local if fits(local, out) else out.copy_(local)


def fits(t: Tensor, like: Tensor) -> bool:
    """Whether `t` can stand beside `like` in a kernel call."""
    return (
        t.dtype == like.dtype
        and t.device == like.device
        and t.stride() == like.stride()
        and not t.is_neg()
    )
