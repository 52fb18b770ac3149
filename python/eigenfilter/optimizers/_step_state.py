"""The state of the current step, shared by an optimizer and its wrappers."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from eigenfilter.optimizers._accumulation import ClosureCheck
from eigenfilter.optimizers._buckets import ParamBucket
from eigenfilter.optimizers._randomness import Randomness

if TYPE_CHECKING:
    from eigenfilter.optimizers._machine import StepMachine

_P = ParamSpec("_P")
_R = TypeVar("_R")


class StepState:
    """The state of the current step. It lives as long as its optimizer and is never saved.

    Some frameworks subclass an optimizer and copy its `__dict__`, others forward attributes to it.
    Such a wrapper shares this object and acts through `owner`.

    Attributes:
        owner: weak reference to the optimizer that was constructed.
        ascents_taken: number of ascents taken in this step.
        skips_ascents: whether this step takes no ascent, because no parameter with a radius has a
            gradient.
        has_closure: whether `step` takes the whole step, with a closure.
        has_written: whether the present call has changed a parameter.
        perturbed: the perturbed buckets, each once.
        perturbed_ids: ids of their parameters; None until they are needed.
        randomness: generator states before an evaluation that is replayed.
        replay_check: generator states after an ascent whose evaluation should be a replay.
        has_replayed: whether that evaluation was a replay.
        check: check of the closure that is running, if it needs one.
        evaluating: whether a closure that `step` calls is running.
        is_unscaled: whether `clip_grad_norm_` had a scaler unscale the descent's gradient.
    """

    def __init__(self, owner: StepMachine) -> None:
        self.owner = weakref.ref(owner)
        self.perturbed: list[ParamBucket] = []
        self.check: ClosureCheck | None = None
        self.evaluating = False
        self.reset()

    def reset(self) -> None:
        """Reset to the state between two steps."""
        self.ascents_taken = 0
        self.skips_ascents = False
        self.has_closure = False
        self.has_written = False
        self.perturbed = []
        self.perturbed_ids: set[int] | None = None
        self.randomness: Randomness | None = None
        self.replay_check: Randomness | None = None
        self.has_replayed = False
        self.is_unscaled = False


def through_owner(
    method: Callable[Concatenate[Any, _P], _R],
) -> Callable[Concatenate[Any, _P], _R]:
    """Make a wrapper that inherits `method` call it on the optimizer that it wraps."""

    def call(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return method(owner_of(self), *args, **kwargs)

    return cast(Callable[Concatenate[Any, _P], _R], functools.wraps(method)(call))


def owner_of(optimizer: Any) -> Any:
    """The optimizer that owns the step state of `optimizer`, which may be a wrapper of it."""
    owner = optimizer._step_state.owner()
    return optimizer if owner is None else owner
