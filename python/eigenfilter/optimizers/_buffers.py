"""Tensors beside the parameters: gradients like them, backups, and the state's buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # imported by torch itself
from torch.nn.parameter import is_lazy

from eigenfilter import _core, _distributed
from eigenfilter.kernels.conventions import arithmetic_dtype, gradient_dtype
from eigenfilter.optimizers._compression import Formats, expanded


class BufferStore:
    """The auxiliary tensors and the state's buffers of one optimizer.

    Args:
        backend: backend of the kernels.
        keys: keys of the buffers in a parameter's state.
        formats: how they are held, and what is held beside them.
    """

    def __init__(self, backend: str | None, keys: tuple[str, ...], formats: Formats) -> None:
        self.backend = backend
        self.formats = formats
        self.keys = keys
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.has_written = False  # whether a kernel has written, see `retry_on_layout_change`
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
        """The buffer of a parameter, created as zeros or converted to its format and strides."""
        return self.formats.fit(key, p, self.state[p])

    def number(self, key: str, p: Tensor) -> Tensor:
        """The numbers of a parameter's buffer on this rank, in the dtype that kernels compute in.

        They are its own memory where that is like the parameter's.
        """
        value = _distributed.local(expanded({**self.state[p], key: self.buffer(key, p)}, key))
        return value if value.dtype == p.dtype else value.to(arithmetic_dtype(p.dtype))

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


def conform(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient with the strides and the placement of its parameter, copied if need be.

    A copy has the parameter's dtype or, if that does not hold every value of the gradient's dtype,
    the next wider one, which the kernels read too.
    """
    if grad.layout != torch.strided:
        raise TypeError(
            f"a gradient of shape {tuple(grad.shape)} is sparse ({grad.layout}): use sparse=False "
            "in the module that makes it, or convert it with .to_dense()"
        )
    like = _distributed.local(param)
    local = _distributed.wait_for_collective(_distributed.local(grad))
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
    """Whether a tensor has this dtype, and the device and the strides of `like`."""
    alike = t.dtype == dtype and t.device == like.device and t.stride() == like.stride()
    return alike and not t.is_neg()


def kind_of(p: Tensor) -> tuple[torch.device, torch.dtype]:
    """What the parameters of a bucket share."""
    return p.device, p.dtype


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
