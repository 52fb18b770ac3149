"""The state of the current step, and decorators of the methods that take part in it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from eigenfilter import _core

_Method = TypeVar("_Method", bound=Callable[..., Any])


class StepState:
    """The state of the current step. It lives as long as its optimizer and is never saved.

    Some frameworks subclass an optimizer and copy its `__dict__`, others forward attributes to it.
    Such a wrapper shares this object and acts through `owner`.

    Attributes:
        owner: weak reference to the optimizer that was constructed.
        evaluating: whether a closure that `step` calls is running.
        with_local_ascents: what leaves the gradients of ascents local; see `ascent_sync`.
        with_local_gradients: which of these have left the last gradient local, for an ascent.
        ascents_taken: number of ascents taken in this step.
        skips_ascents: whether no parameter with a radius has a gradient, so that none is taken.
        has_closure: whether `step` takes the whole step, with a closure.
        clears: number of calls of `zero_grad`, over all steps.
        is_unscaled: whether `clip_grad_norm_` had a scaler unscale the descent's gradient.
    """

    def __init__(self, owner: torch.optim.Optimizer) -> None:
        self.owner = weakref.ref(owner)
        self.evaluating = False
        self.with_local_ascents: weakref.WeakSet[Any] = weakref.WeakSet()
        self.with_local_gradients: weakref.WeakSet[Any] = weakref.WeakSet()
        self.clears = 0
        self.reset()

    def reset(self) -> None:
        """Reset to the state between two steps."""
        self.ascents_taken = 0
        self.skips_ascents = False
        self.has_closure = False
        self.is_unscaled = False

    def refuse_within_closure(self, what: str) -> None:
        """Raise RuntimeError if a closure that `step` calls is running."""
        if self.evaluating:
            raise RuntimeError(
                f"{what} was called by the closure that step(closure) is evaluating: a closure "
                "calls opt.zero_grad() and backward() and returns the loss, and the step is taken "
                "around it"
            )

    def refuse_local_gradients(self) -> None:
        """Raise RuntimeError if the last gradient is local, which only an ascent may follow."""
        if self.with_local_gradients:
            raise RuntimeError(
                "step() was to descend along the gradient of this process alone, which its forward "
                "pass left local for an ascent (ascent_sync): rho has changed since. Change rho "
                "before the forward pass; now call opt.zero_grad(), and take a forward and a "
                "backward pass again"
            )

    def refuse_begun(self) -> None:
        """Raise RuntimeError if an explicit step has taken ascents, and has some left."""
        if self.ascents_taken > 0:
            raise RuntimeError(
                "step(closure) takes a whole step, and one is under way that has ascents left: go "
                "on with `while opt.ascend(): closure()` and end it with step(), or go back to x "
                "with restore()"
            )

    def refuse_missing_ascents(self, wanted: int) -> None:
        """Raise RuntimeError for a descent before all ascents were taken."""
        raise RuntimeError(
            f"step() needs {wanted} ascents before it, and {self.ascents_taken} were taken. Pass a "
            "closure to step() that calls opt.zero_grad() and backward(), or write `while "
            "opt.ascend(): closure()` before step(). In the training loop of a framework, which "
            "calls step() without a closure, use its module of eigenfilter.integrations "
            "(transformers.SharpnessAwareTrainer, accelerate.SharpnessAwareBackward and others), "
            "or rho=0.0 in every group"
        )


def retry_on_layout_change(method: _Method) -> _Method:
    """Make a method build the buckets of its object again on a LayoutError, and run once more.

    `model.to(dtype)` and `model.to(memory_format=...)` change parameters in place. The kernels
    notice before they write. Only a call that begins at x and has written nothing is repeated.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        buckets = self._buckets
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


def through_owner(method: _Method) -> _Method:
    """Make a wrapper that inherits `method` call it on the optimizer that it wraps."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(owner_of(self), *args, **kwargs)

    return cast(_Method, call)


def owner_of(optimizer: Any) -> Any:
    """The optimizer that owns the step state of `optimizer`, which may be a wrapper of it."""
    owner = optimizer._step_state.owner()
    return optimizer if owner is None else owner
