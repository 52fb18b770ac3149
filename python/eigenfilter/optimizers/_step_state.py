"""The state of the step under way, shared by an optimizer and every wrapper that borrows it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from eigenfilter.optimizers._accumulation import ClosureCheck
from eigenfilter.optimizers._parts import Part
from eigenfilter.optimizers._randomness import Randomness

if TYPE_CHECKING:
    from eigenfilter.optimizers._machine import StepMachine

_P = ParamSpec("_P")
_R = TypeVar("_R")


class StepState:
    """What changes while a step is under way. It lives as long as its optimizer, and is not saved.

    Frameworks subclass an optimizer and copy its `__dict__`, or forward what they lack to it. Such
    a wrapper then has this same object, never a copy of its numbers, and acts through `owner`.

    Attributes:
        owner: a weak reference to the optimizer that was constructed.
        ascended: ascents taken in the step under way.
        plain: whether the step under way takes no ascent, because nothing with a radius has a
            gradient.
        by_closure: whether `step` takes the whole step, with a closure.
        written: whether the present call has changed a parameter.
        perturbed: the parts that are perturbed, none twice.
        perturbed_ids: ids of their parameters, once asked for.
        randomness: the generators before an evaluation that is replayed.
        between: the generators after an ascent whose evaluation should be a replay.
        replayed: whether it was.
        check: of the closure that is running, where one is needed.
        evaluating: whether a closure that `step` calls is running.
        unscaled: whether `clip_grad_norm_` had a scaler unscale the descent's gradient.
    """

    def __init__(self, owner: StepMachine) -> None:
        self.owner = weakref.ref(owner)
        self.perturbed: list[Part] = []
        self.check: ClosureCheck | None = None
        self.evaluating = False
        self.reset()

    def reset(self) -> None:
        """No step is under way."""
        self.ascended = 0
        self.plain = False
        self.by_closure = False
        self.written = False
        self.perturbed = []
        self.perturbed_ids: set[int] | None = None
        self.randomness: Randomness | None = None
        self.between: Randomness | None = None
        self.replayed = False
        self.unscaled = False


def through_owner(
    method: Callable[Concatenate[Any, _P], _R],
) -> Callable[Concatenate[Any, _P], _R]:
    """Have a wrapper that inherits `method` call it on the optimizer it wraps."""

    def call(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return method(owner_of(self), *args, **kwargs)

    return cast(Callable[Concatenate[Any, _P], _R], functools.wraps(method)(call))


def owner_of(optimizer: Any) -> Any:
    """The optimizer whose step state `optimizer` has; itself, unless it wraps that one."""
    owner = optimizer._step_state.owner()
    return optimizer if owner is None else owner
