"""Released gradients: each is applied and freed as soon as backward has computed it."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eigenfilter import _callers, _distributed
from eigenfilter.optimizers._step_state import retry_on_layout_change
from eigenfilter.optimizers.amp import AmpState, is_enabled
from eigenfilter.optimizers.buckets import ParamBuckets
from eigenfilter.optimizers.updates import Update


class GradientRelease:
    """Updates parameter by parameter, in hooks, inside the context `during_backward`.

    The hook of a parameter runs after all its uses have been differentiated. A segment that
    backward recomputes (activation checkpointing) from a detached parameter sees the update.

    Args:
        buckets: the buckets of the optimizer.
        update: its update.
        amp: the loss scale and the flags of its steps, of which these steps have none.

    Attributes:
        updated_ids: ids of the parameters that this step has updated.
    """

    def __init__(self, buckets: ParamBuckets, update: Update, amp: AmpState) -> None:
        self.updated_ids: set[int] = set()
        self._buckets = buckets
        self._update = update
        self._amp = amp
        self._inside = False
        self._lock = threading.Lock()  # backward has a thread for each GPU
        self._has_warned = False

    @contextmanager
    def during_backward(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A context in which the gradients of the optimizer's parameters are released.

        Raises:
            RuntimeError: ranks reduce the gradients, which are partial while backward runs; or
                compiled autograd computes them all at once.
        """
        if self._inside:
            yield
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if _distributed.is_parallel() or any(map(_distributed.is_dtensor, params)):
            raise RuntimeError(
                "release_gradients=True applies gradients before DDP, FSDP2 or tensor parallelism "
                "reduce them: leave it False in a distributed job"
            )
        compiled = sys.modules.get("torch._dynamo.compiled_autograd")
        if getattr(compiled, "compiled_autograd_enabled", False):
            raise RuntimeError(
                "release_gradients=True frees each gradient before the next is made, and compiled "
                "autograd computes all of them in one graph: leave it False, or leave compiled "
                "autograd off"
            )
        if not self.updated_ids:
            self._buckets.refresh(optimizer)
        if not self._buckets.perturbed:  # an ascent has begun the step
            self._amp.begin()
        trained = [p for p in params if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in trained]
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            for hook in hooks:
                hook.remove()

    def refuse_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        """Raise RuntimeError for a scaler, which needs all gradients before the first update."""
        if is_enabled(scaler):
            raise RuntimeError(_UNSCALED)

    def check_descent(self, optimizer: torch.optim.Optimizer, has_gradients: bool) -> None:
        """Refuse a GradScaler's step; warn, once, that a step's gradients were not released."""
        if "found_inf" in vars(optimizer):
            raise RuntimeError(_UNSCALED)
        if has_gradients and not self._has_warned and not self.updated_ids:
            self._has_warned = True
            warnings.warn(
                "release_gradients=True released nothing in this step: use step(closure), or call "
                "the closure inside `with opt.evaluation():`",
                stacklevel=_callers.stacklevel(),
            )

    def _on_gradient(self, p: Tensor) -> None:
        with self._lock:
            if id(p) in self.updated_ids:
                raise RuntimeError(
                    "a second gradient arrived for a parameter that release_gradients=True has "
                    "updated: end each step with step(), and call backward() once in an "
                    "evaluation; gradients to accumulate come before it, outside "
                    "`with opt.evaluation():`"
                )
            self._apply(p)
            self.updated_ids.add(id(p))
            p.grad = None

    @retry_on_layout_change
    @torch.no_grad()
    def _apply(self, p: Tensor) -> None:
        """Update one parameter within the backward pass that has computed its gradient."""
        if not self.updated_ids:
            self._buckets.refresh()
        bucket_slice = self._buckets.single(p)
        if self._update.creates_state(bucket_slice):
            bucket_slice.check()
        self._update.step(bucket_slice)
        self._buckets.mark_written([bucket_slice.bucket])


_UNSCALED = (
    "release_gradients=True applies each gradient before a GradScaler has looked at all of them: "
    "leave it False, or train in bfloat16 without a scaler"
)
