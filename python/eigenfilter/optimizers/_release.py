"""Gradients that are released: each is applied and dropped as soon as backward has made it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from eigenfilter.optimizers import _distributed

if TYPE_CHECKING:
    from eigenfilter.optimizers._base import EigenfilterOptimizer

UNSCALED = (
    "release_gradients=True applies each gradient before a GradScaler has looked at all of them: "
    "leave it False, or train in bfloat16 without a scaler"
)


class GradientRelease:
    """Takes the descent parameter by parameter, by hooks, while `during_backward`.

    A parameter's hook comes after all its uses have been differentiated, so none needs its value.

    Attributes:
        updated: ids of the parameters that have taken this step's descent.
    """

    def __init__(self, optimizer: EigenfilterOptimizer) -> None:
        self.updated: set[int] = set()
        self._optimizer = weakref.ref(optimizer)
        self._hooked: set[int] = set()
        self._awaited: set[int] = set()  # none while no backward pass is expected

    @contextmanager
    def during_backward(self, params: list[Tensor]) -> Iterator[None]:
        """Where the gradients of `params` are released.

        Raises:
            RuntimeError: gradients are reduced over ranks, so not whole when backward has them.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several or any(map(_distributed.is_dtensor, params)):
            raise RuntimeError(
                "release_gradients=True applies gradients before DDP, FSDP2 or tensor parallelism "
                "reduce them: leave it False in a distributed job"
            )
        for p in params:
            if p.requires_grad and id(p) not in self._hooked:
                p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
                self._hooked.add(id(p))
        self._awaited = set(map(id, params))
        try:
            yield
        finally:
            self._awaited = set()

    def require_all(self, found: Sized) -> None:
        """Raise if gradients are left that were not released."""
        if found:
            raise RuntimeError(
                "release_gradients=True applies the descent's gradients while backward runs, and "
                "some are left: use step(closure), or call the closure inside "
                "`with opt.evaluation():`"
            )

    def _arrived(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or id(p) not in self._awaited:
            return
        if id(p) in self.updated:
            raise RuntimeError(
                "a second gradient arrived for a parameter that release_gradients=True has "
                "updated: end each step with step(), and call backward() once in an evaluation; "
                "gradients to accumulate come before it, outside `with opt.evaluation():`"
            )
        optimizer._descend_alone(p)
        self.updated.add(id(p))
        p.grad = None
