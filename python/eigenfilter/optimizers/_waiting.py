"""Gradients that wait for each other in a backward pass, and what tells that they were changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eigenfilter import _distributed

COMPARED = 32, 1024
"""How many gradients that wait are compared with what backward has computed, and elements of each.

Clipping scales all gradients, so that a few that are not zero tell of it.
"""


@dataclass
class WaitingGradients:
    """Parameters whose gradients wait to be used together.

    One gradient, the smallest that is not empty, waits until backward has ended: whoever changes
    gradients then, as by clipping, changes it too, and is noticed.

    Attributes:
        params: the parameters.
        grads: their gradients, by the parameters' ids.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: dict[int, Tensor] = field(default_factory=dict)
    _bytes: int = 0  # of all parameters in this process
    _smallest: Tensor | None = None
    _least: int = 0  # bytes of the smallest
    # After backward: the versions of all, and the first bytes of some, by the parameters' ids.
    _versions: dict[int, int] = field(default_factory=dict)
    _heads: dict[int, Tensor] = field(default_factory=dict)

    def add(self, p: Tensor, g: Tensor, size: int) -> None:
        """Have the gradient of a parameter of `size` bytes wait."""
        self.params.append(p)
        self.grads[id(p)] = g
        self._bytes += size
        if self._least == 0 or 0 < size < self._least:
            self._smallest, self._least = p, size

    def take(self, batch_bytes: int) -> WaitingGradients | None:
        """Take all gradients but the smallest, if they have `batch_bytes` together."""
        last = self._smallest
        if last is None or len(self.params) < 2 or self._bytes - self._least < batch_bytes:
            return None
        taken = WaitingGradients([p for p in self.params if p is not last], self.grads)
        self.params, self._bytes = [last], self._least
        self.grads = {id(last): taken.grads.pop(id(last))}
        self._versions.clear()
        self._heads.clear()
        return taken

    @torch.no_grad()
    def record(self, params: Sequence[Tensor]) -> None:
        """Record the gradients of some of the parameters as backward has left them."""
        for key in map(id, params):
            self._versions[key] = version(self.grads[key])
            if key in self._heads or len(self._heads) < COMPARED[0]:
                self._heads[key] = _head(self.grads[key]).clone()

    @torch.no_grad()
    def refuse_changed(self) -> None:
        """Raise RuntimeError if a gradient has been changed after backward.

        Versions tell of changes in place, also of a multiplication by 1. They do not count those of
        a DTensor by torch's foreach functions, nor any through `.data` or NumPy: values tell of
        these, for which the CPU waits for a GPU.
        """
        if len(self._versions) < len(self.params):
            raise RuntimeError(_FAILED)
        for p, g in zip(self.params, self.grads.values(), strict=True):
            if version(g) != self._versions[id(p)] or not (p.grad is None or p.grad is g):
                raise RuntimeError(_CHANGED)
        present = torch.cat([_head(self.grads[key]) for key in self._heads])
        if not torch.equal(present, torch.cat(list(self._heads.values()))):
            raise RuntimeError(_CHANGED)


def version(g: Tensor) -> int:
    """How often a tensor has been changed in place; 0 for one that does not count it."""
    return 0 if g.is_inference() else g._version


def _head(g: Tensor) -> Tensor:
    """The bytes of a gradient's first elements in this process."""
    t = _distributed.local(g).detach()
    return (t._values() if t.is_sparse else t).reshape(-1)[: COMPARED[1]].view(torch.uint8)


_CHANGED = (
    "gradients were changed after backward, as by clipping, and release_gradients=True has used "
    "others by then, as they were: leave it False, or end the evaluation with backward()"
)
_FAILED = (
    "backward failed in an evaluation whose closure caught the error, and release_gradients=True "
    "may have used some gradients by then: let the error leave the closure, or leave it False"
)
