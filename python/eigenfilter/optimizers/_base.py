"""The machine every optimizer steps with: ascents, descent, restoration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # does not import the compiler, as torch.compiler does

from eigenfilter import _distributed, kernels
from eigenfilter.optimizers._ascents import Ascent, total_norms
from eigenfilter.optimizers._descents import Descent
from eigenfilter.optimizers._guard import HANDED_OVER, drop_handed_over, refuse_unscaled
from eigenfilter.optimizers._machine import StepMachine
from eigenfilter.optimizers._options import check_options
from eigenfilter.optimizers._parts import conforming
from eigenfilter.optimizers._randomness import Randomness
from eigenfilter.optimizers._release import UNSCALED
from eigenfilter.optimizers._shards import (
    refuse_ascent,
    refuse_clipping,
)
from eigenfilter.optimizers._step_state import owner_of, through_owner

_T = TypeVar("_T")


class EigenfilterOptimizer(StepMachine):
    """Base of the optimizers: an update at x from a gradient taken elsewhere.

    A step visits perturbed points before the descent,

        closure()
        while opt.ascend():     # moves to the next point where a gradient is needed
            closure()
        opt.step()              # restores x exactly and applies the update

    or, with torch's contract, `loss = opt.step(closure)`. How the points are reached is the
    `Ascent`'s, what happens at x the `Descent`'s.

    Args:
        params: parameters, named parameters or groups, as for torch.optim.Optimizer.
        defaults: the groups' hyperparameters.
        ascent: how to move.
        descent: how to update.
        skip_nonfinite: look at every gradient, and leave parameters and state as they were where
            one is not finite (one more pass over the gradient). In a distributed job the flag is
            shared by all ranks of the default process group, which must then step together.
        release_gradients: apply and drop each descent gradient while backward runs, see
            `GradientRelease`.
        backend: the kernels' backend, see `eigenfilter.kernels`.
        options: `set_to_none` and arguments of torch's optimizers, see `_options.Options`.
    """

    # A GradScaler hands grad_scale and found_inf over instead of unscaling and looking itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        ascent: Ascent,
        descent: Descent,
        *,
        skip_nonfinite: bool = False,
        release_gradients: bool = False,
        backend: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.set_to_none = check_options(options or {}, type(self).__name__)
        if skip_nonfinite and release_gradients:
            raise ValueError(
                "release_gradients applies each gradient before the next is made, and "
                "skip_nonfinite needs all of them first: choose one"
            )
        if release_gradients and not self.set_to_none:
            raise ValueError(
                "release_gradients drops each gradient, and set_to_none=False keeps them: choose "
                "one"
            )
        if backend is not None and backend not in kernels.BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: choose one of {kernels.BACKENDS}")
        self.skip_nonfinite = skip_nonfinite
        self.release_gradients = release_gradients
        self.backend = backend
        self._ascent = ascent
        self._descent = descent
        self._start()
        super().__init__(params, defaults)
        if self._ascents_wanted() > 0:
            refuse_ascent(self, self._parent, self._params(), self._ascent.takes_norm)

    # What users see of a step under way.

    @property
    def skipped(self) -> int:
        """How many steps were skipped for a gradient that was not finite (synchronises)."""
        return self._guard.skipped()

    @property
    @through_owner
    def needs_graph(self) -> bool:
        """Whether the next gradient has to be differentiable itself.

        For `loss.backward(create_graph=opt.needs_graph)`; False unless a method takes exact
        Hessian-vector products.
        """
        return self.phase == "ascent" and self._ascent.needs_graph(self._step_state.ascended)

    # Stepping.

    @through_owner
    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context for every call of the closure in the explicit form.

        Where a method takes finite differences, torch's random numbers are the same on both sides.
        With `release_gradients` the descent's gradients are released here and nowhere else.
        """
        step = self._step_state
        replays = self._ascent.replays(step.ascended) if self.phase == "ascent" else None
        if replays and step.randomness is not None:
            step.randomness.replay()
            step.replayed = True
        elif replays is False:
            step.randomness = Randomness(self._devices())
        if self.phase == "ascent":
            with self._ascent.watch(step.ascended, self._params()):
                yield
            return
        if not self.release_gradients:
            yield
            return
        with self._release.during_backward(self._params()):
            yield

    @through_owner
    @_disable_dynamo
    @torch.no_grad()
    def ascend(self, grad_scaler: torch.amp.GradScaler | None = None) -> bool:
        """Perturb the parameters to where the next gradient is needed, and clear the gradients.

        A parameter without a gradient counts as one whose gradient is zero.

        Args:
            grad_scaler: the scaler whose scale the present gradients carry.

        Returns:
            True after an ascent. False, with nothing done, when the next gradient is the descent's,
            or when no parameter has a gradient: `step()` then does nothing either, as in torch.

        Raises:
            RuntimeError: the gradients are those that the last step used, `grad_scaler.unscale_`
                was called, or gradients are released and there is a scaler.
            TypeError, ValueError: a group's hyperparameter is none, or out of its range.
        """
        self._refuse_within_closure("ascend()")
        self._step_state.plain = False
        if self.phase == "descent":
            return False
        if self.release_gradients and grad_scaler is not None and grad_scaler.is_enabled():
            raise RuntimeError(UNSCALED)
        refuse_unscaled(self, grad_scaler)
        self._check_groups()
        return self._following_layouts(lambda: self._ascend(grad_scaler))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step: the whole one with a closure, else its end, the descent.

        Where no parameter has a gradient nothing is done, as in torch.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.
                It is called as often as the method needs. After the ascents of an explicit step it
                is called once, and may do nothing.

        Returns:
            The first call's loss, detached if it has a graph; None without a closure.

        Raises:
            RuntimeError: without a closure, ascents are due; with one, it does not clear gradients
                that were there before, or an explicit step has ascents left.
            TypeError, ValueError: a group's hyperparameter is none, or out of its range.
        """
        owner = owner_of(self)
        if owner is not self:  # a scaler sets these on what it was given
            vars(owner).update({k: v for k, v in vars(self).items() if k in HANDED_OVER})
            try:
                return owner._step(closure)
            except BaseException:  # a scaler takes them back only after success
                drop_handed_over(self)
                raise
            finally:
                drop_handed_over(owner)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._refuse_within_closure("step()")
        self._check_groups()
        if closure is None:
            try:
                self._following_layouts(self._descend)
            except BaseException:  # a scaler takes back what it handed over only after success
                drop_handed_over(self)
                raise
            return None
        if "found_inf" in vars(self):
            drop_handed_over(self)
            raise RuntimeError(
                "a GradScaler cannot step with a closure: take the step in its explicit form, "
                "ascend(grad_scaler=scaler) and scaler.step(opt)"
            )
        if self._step_state.ascended > 0 and self.phase == "ascent":
            raise RuntimeError(
                "step(closure) takes a whole step, and one is under way that has ascents left: go "
                "on with `while opt.ascend(): closure()` and end it with step(), or go back to x "
                "with restore()"
            )
        try:
            if self.phase == "descent":  # no ascents, or all of an explicit step's are taken
                loss = self._evaluate(closure)
            else:
                self._step_state.by_closure = True
                loss = self._evaluate_first(closure)
            while self.ascend():
                self._evaluate(closure)
            self._following_layouts(self._descend)
        except BaseException:
            self._restore()
            raise
        return loss

    @through_owner
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters: to None, or to 0 in the tensors that are there."""
        super().zero_grad(set_to_none)
        self._used.forget()
        if self._step_state.check is not None:
            self._step_state.check.forget()

    @through_owner
    @_disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Go back to x, bit for bit, from anywhere; the step under way is forgotten.

        Parameters that have been updated already (`release_gradients`) stay so. Gradients of the
        points on the way do not count as gradients at x.

        Raises:
            RuntimeError: it is called by the closure that `step` is evaluating.
        """
        self._refuse_within_closure("restore()")
        if self.perturbed:
            self._used.mark(self._params())
        self._restore()

    @through_owner
    def clip_grad_norm_(
        self, max_norm: float, grad_scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Clip the descent gradient to a total norm, in place, as torch.nn.utils.clip_grad_norm_.

        Args:
            max_norm: the largest norm, over all parameters of all groups.
            grad_scaler: the scaler whose scale the gradients carry; it unscales them first.

        Returns:
            The total norm before clipping, a 0-dim float64 tensor.

        Raises:
            RuntimeError: the next gradient is an ascent's, which the methods take unclipped; or
                gradients are released.
        """
        if self.release_gradients:
            raise RuntimeError(
                "release_gradients=True applies each gradient before the total norm is known: "
                "leave it False to clip"
            )
        refuse_clipping(self, self._parent, self._params())
        if self.phase == "ascent":
            raise RuntimeError(
                "clip_grad_norm_ clips the descent gradient: call it after the ascents, just "
                "before step()"
            )
        if grad_scaler is not None:
            grad_scaler.unscale_(self)
            self._step_state.unscaled = grad_scaler.is_enabled()
        return self._clip(max_norm)

    @torch.no_grad()
    def _clip(self, max_norm: float) -> Tensor:
        """Clip to a norm in float64: a narrower one may be infinite where all gradients are not."""
        found = conforming(self._gradients())
        norms = total_norms(found)
        for part, _ in found:
            shorter = (max_norm / (norms[part.device] + 1e-6)).clamp(max=1.0)
            given = [_distributed.local(cast(Tensor, p.grad)) for p in part.params]
            torch._foreach_mul_(given, shorter)
        return next(iter(norms.values()), torch.zeros((), dtype=torch.float64))

    # Copying.

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copying or pickling")
        names = ["skip_nonfinite", "release_gradients", "set_to_none", "backend"]
        names += ["_ascent", "_descent"]
        return super().__getstate__() | {name: vars(self)[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_step_state" not in vars(self):  # a copy; a load keeps backups and counts
            self._start()
