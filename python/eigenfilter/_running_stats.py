"""Running statistics at perturbed weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy

from eigenfilter import _distributed


@contextmanager
def freeze_running_stats(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Preserve every buffer of a model: on exit each is the tensor, with the value, of entry.

    Use it for gradients at perturbed weights, whose running statistics would otherwise mix with
    those of x. Inside the context layers work as usual: batch norm normalizes by its batch, and
    spectral norm takes its power iteration. On exit, also after an exception, each module has the
    buffers that it had on entry, the same tensors with the same values: the statistics of batch
    and instance norm with their counters, the vectors of spectral norm, the ranges of quantization
    observers, moving averages of your own. What a forward pass registered or replaced is put back.

    The context keeps buffers, and on request parameters that are not trained. The optimizer
    restores trained parameters. Numbers or tensors that a module holds as plain attributes stay as
    the forward pass left them, and so do buffers that `torch.func.functional_call` is given in
    place of the model's own.

    Args:
        model: model whose buffers are preserved, with all submodules, in training mode or not.
        parameters: whether to preserve parameters with requires_grad=False too, for models that
            update such parameters in their forward pass, as a momentum encoder. The context holds
            a copy of each, including a frozen backbone.

    Raises:
        RuntimeError: a lazy module has not seen a batch yet, so there is nothing to preserve.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> before = model[1].running_mean.clone()
        >>> with eigenfilter.freeze_running_stats(model):  # as around the closure after an ascent
        ...     loss = model(torch.rand(4, 2)).sum()
        >>> torch.equal(model[1].running_mean, before)
        True
    """
    registered = [(module, dict(module._buffers)) for module in model.modules()]
    tensors = [t for _, buffers in registered for t in buffers.values() if t is not None]
    if parameters:
        tensors += [p for p in model.parameters() if not p.requires_grad]
    values = _Values(tensors)
    try:
        yield
    finally:
        for module, buffers in registered:
            _register(module, buffers)
        values.restore()


freeze_batch_norm = freeze_running_stats
"""The former name of `freeze_running_stats`."""


class _Values:
    """The values of some tensors at one moment."""

    def __init__(self, tensors: list[Tensor]) -> None:
        if any(map(is_lazy, tensors)):
            raise RuntimeError(
                "the model has a lazy module whose buffers have no shape yet: run one batch "
                "through the model before freeze_running_stats(model)"
            )
        distinct = {id(t): _distributed.local(t) for t in tensors}.values()
        self._tensors = [t for t in distinct if _is_writable(t)]
        self._memory = [t.detach() for t in self._tensors]  # the memory at entry
        self._versions = [t._version for t in self._tensors]
        self._copies = [_like(t) for t in self._tensors]
        _copy(self._copies, self._tensors)

    def restore(self) -> None:
        """Write the values back.

        Kernels such as batch norm's write without a version bump, because no graph reads their
        results. Writing back bumps no version either, so that a graph made inside the context can
        be differentiated outside. Other writes bump the version in both directions.
        """
        pairs = list(zip(self._tensors, self._copies, strict=True))
        for t, memory in zip(self._tensors, self._memory, strict=True):
            # Observers resize their ranges; `t.data = batch` puts a tensor elsewhere.
            if t.shape != memory.shape or _address(t) != _address(memory):
                t.data = memory
        same = [t._version == at for t, at in zip(self._tensors, self._versions, strict=True)]
        silent = [pair for pair, is_same in zip(pairs, same, strict=True) if is_same]
        announced = [pair for pair, is_same in zip(pairs, same, strict=True) if not is_same]
        _copy([t for t, _ in announced], [copy for _, copy in announced])
        tensors = [t for t, _ in silent]
        with _unsafe_preserve_version_counter(tuple(tensors)):
            _copy(tensors, [copy for _, copy in silent])


@torch.no_grad()
def _copy(into: list[Tensor], of: list[Tensor]) -> None:
    pairs = list(zip(into, of, strict=True))
    plain = [(t, c) for t, c in pairs if not (t.is_conj() or t.is_neg() or t.is_nested)]
    for t, copy in pairs:
        if t.is_conj() or t.is_neg() or t.is_nested:  # which torch copies one by one only
            t.copy_(copy)
    if plain:  # torch refuses empty lists
        torch._foreach_copy_([t for t, _ in plain], [c for _, c in plain])


def _address(t: Tensor) -> int:
    """The address of a tensor; 0 if it has no single memory."""
    return t.data_ptr() if t.layout == torch.strided and not t.is_nested else 0


def _like(t: Tensor) -> Tensor:
    """Memory for a copy of `t`; a copy itself if its layout is not plain."""
    plain = t.layout == torch.strided and not t.is_quantized
    return torch.empty_like(t, requires_grad=False) if plain else t.detach().clone()


def _is_writable(t: Tensor) -> bool:
    """Whether torch lets a forward pass write to `t` at all."""
    overlaps = t.layout == torch.strided and torch._debug_has_internal_overlap(t) == 1
    return not t.is_inference() and not overlaps


def _register(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    """Set the buffers of a module to exactly `buffers`."""
    now = module._buffers
    for name in [name for name in now.keys() if name not in buffers]:  # noqa: SIM118
        del now[name]
    for name, t in buffers.items():
        if name not in now or now[name] is not t:
            now[name] = t
