"""Gradients that are released: each is applied and dropped as soon as backward has made it."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from eigenfilter import _distributed

UNSCALED = (
    "release_gradients=True applies each gradient before a GradScaler has looked at all of them: "
    "leave it False, or train in bfloat16 without a scaler"
)


class GradientRelease:
    """Takes the descent parameter by parameter, by hooks, while `during_backward`.

    `descend`, a method, takes the descent of one parameter. Its object is not kept alive.

    A parameter's hook comes after all its uses have been differentiated. What is computed anew in
    backward (activation checkpointing) from a detached parameter sees the update.

    Attributes:
        updated: ids of the parameters that have taken this step's descent.
    """

    def __init__(self, descend: Callable[[Tensor], None]) -> None:
        self.updated: set[int] = set()
        self._descend = weakref.WeakMethod(descend)
        self._inside = False
        self._lock = threading.Lock()  # backward has a thread for each GPU
        self._warned = False

    @contextmanager
    def during_backward(self, params: list[Tensor]) -> Iterator[None]:
        """Where the gradients of `params` are released.

        Raises:
            RuntimeError: gradients are reduced over ranks, so not whole when backward has them.
        """
        if self._inside:
            yield
            return
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several or any(map(_distributed.is_dtensor, params)):
            raise RuntimeError(
                "release_gradients=True applies gradients before DDP, FSDP2 or tensor parallelism "
                "reduce them: leave it False in a distributed job"
            )
        hooks = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for p in params
            if p.requires_grad
        ]
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            for hook in hooks:
                hook.remove()

    def warn_of_whole(self) -> None:
        """Warn, once, that a step had gradients and none was released."""
        if not self._warned and not self.updated:
            self._warned = True
            warnings.warn(
                "release_gradients=True released nothing in this step: use step(closure), or call "
                "the closure inside `with opt.evaluation():`",
                stacklevel=5,
            )

    def _arrived(self, p: Tensor) -> None:
        descend = self._descend()
        if descend is None:
            return
        with self._lock:
            if id(p) in self.updated:
                raise RuntimeError(
                    "a second gradient arrived for a parameter that release_gradients=True has "
                    "updated: end each step with step(), and call backward() once in an "
                    "evaluation; gradients to accumulate come before it, outside "
                    "`with opt.evaluation():`"
                )
            descend(p)
            self.updated.add(id(p))
            p.grad = None
