"""Gradients that wait for each other in a backward pass, and what tells that they were changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eigenfilter import _distributed

COMPARED = 1024
"""How many elements of each gradient that waits are compared with what backward has computed."""


@dataclass
class WaitingGradients:
    """Parameters whose gradients wait to be used together.

    One gradient, the smallest that is not empty, waits until backward has ended: whoever changes
    gradients then, as by clipping, changes it too, and is noticed.

    Attributes:
        params: the parameters.
        grads: their gradients, by the parameters' ids.
        bytes: the bytes that each parameter takes in this process, by its id.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: dict[int, Tensor] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)
    _total: int = 0
    _smallest: Tensor | None = None
    # Versions and first bytes, after backward, by the parameters' ids.
    _records: dict[int, tuple[int, Tensor]] = field(default_factory=dict)

    def add(self, p: Tensor, g: Tensor, size: int) -> None:
        """Have the gradient of a parameter of `size` bytes wait."""
        self.params.append(p)
        self.grads[id(p)] = g
        self.bytes[id(p)] = size
        self._total += size
        least = 0 if self._smallest is None else self.bytes[id(self._smallest)]
        if least == 0 or 0 < size < least:
            self._smallest = p

    def take(self, batch_bytes: int) -> WaitingGradients | None:
        """Take all gradients but the smallest, if they have `batch_bytes` together."""
        last = self._smallest
        if last is None or len(self.params) < 2 or self._total - self.bytes[id(last)] < batch_bytes:
            return None
        taken = WaitingGradients([p for p in self.params if p is not last], self.grads, self.bytes)
        self.params, self._total = [last], taken.bytes.pop(id(last))
        self.grads, self.bytes = {id(last): taken.grads.pop(id(last))}, {id(last): self._total}
        self._records.clear()
        return taken

    @torch.no_grad()
    def record(self, params: Sequence[Tensor]) -> None:
        """Record the gradients of some of the parameters as backward has left them."""
        if not params:
            return
        grads = [self.grads[id(p)] for p in params]
        heads = [_head(g) for g in grads]
        copies = torch.split(torch.cat(heads), [len(head) for head in heads])
        for p, g, copy in zip(params, grads, copies, strict=True):
            self._records[id(p)] = version(g), copy

    @torch.no_grad()
    def refuse_changed(self) -> None:
        """Raise RuntimeError if a gradient has been changed after backward.

        Versions tell of changes in place, also of a multiplication by 1. They do not count those of
        a DTensor by torch's foreach functions, nor any through `.data` or NumPy: values tell of
        these, for which the CPU waits for a GPU.
        """
        if len(self._records) < len(self.params):
            raise RuntimeError(_FAILED)
        for p, g in zip(self.params, self.grads.values(), strict=True):
            if version(g) != self._records[id(p)][0] or not (p.grad is None or p.grad is g):
                raise RuntimeError(_CHANGED)
        recorded = torch.cat([self._records[id(p)][1] for p in self.params])
        if not torch.equal(recorded, torch.cat([_head(g) for g in self.grads.values()])):
            raise RuntimeError(_CHANGED)


def version(g: Tensor) -> int:
    """How often a tensor has been changed in place; 0 for one that does not count it."""
    return 0 if g.is_inference() else g._version


def _head(g: Tensor) -> Tensor:
    """The bytes of a gradient's first elements in this process."""
    t = _distributed.local(g).detach()
    return (t._values() if t.is_sparse else t).reshape(-1)[:COMPARED].view(torch.uint8)


_CHANGED = (
    "gradients were changed after backward, as by clipping, and release_gradients=True has used "
    "others by then, as they were: leave it False, or end the evaluation with backward()"
)
_FAILED = (
    "backward failed in an evaluation whose closure caught the error, and release_gradients=True "
    "may have used some gradients by then: let the error leave the closure, or leave it False"
)
