"""The public step protocol of every optimizer: ascents, descent, restoration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # does not import the compiler, as torch.compiler does

from eigenfilter import _distributed, kernels
from eigenfilter.optimizers._amp import SCALER_ATTRIBUTES, drop_scaler_attributes, refuse_unscaled
from eigenfilter.optimizers._ascents import Ascent, total_norms
from eigenfilter.optimizers._buckets import conform_if_needed
from eigenfilter.optimizers._descents import Descent
from eigenfilter.optimizers._machine import StepMachine
from eigenfilter.optimizers._options import check_options
from eigenfilter.optimizers._randomness import Randomness
from eigenfilter.optimizers._release import UNSCALED
from eigenfilter.optimizers._shards import (
    refuse_ascent,
    refuse_clipping,
)
from eigenfilter.optimizers._step_state import owner_of, through_owner

_T = TypeVar("_T")


class EigenfilterOptimizer(StepMachine):
    """Base of the optimizers: an update at x whose gradient is taken at a perturbed point.

        closure()
        while opt.ascend():     # perturbs the parameters to where the next gradient is needed
            closure()
        opt.step()              # restores x exactly and applies the update

    or, with torch's contract, `loss = opt.step(closure)`. See docs/optimizers.md.

    Args:
        params: parameters, named parameters or groups, as for torch.optim.Optimizer.
        defaults: default hyperparameters of the groups.
        ascent: perturbs the parameters before the descent.
        descent: updates the parameters at x.
        skip_nonfinite: whether a step with a gradient that is not finite leaves parameters and
            state unchanged. The check takes one more pass over the gradient. In a distributed job
            all ranks of the default process group share the flag, and must step together.
        release_gradients: whether each descent gradient is applied and freed while backward runs;
            see `GradientRelease`.
        backend: backend of the kernels; see `eigenfilter.kernels`.
        options: `set_to_none` and arguments of torch's optimizers, see `_options.Options`.
    """

    # A GradScaler then sets grad_scale and found_inf on the optimizer, and leaves the gradients
    # scaled.
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
            refuse_ascent(self, self._parent, self._params(), self._ascent.needs_norm)

    # The state of a step.

    @property
    def skipped(self) -> int:
        """The number of steps skipped for a gradient that was not finite (synchronizes)."""
        return self._amp.skipped()

    @property
    @through_owner
    def needs_graph(self) -> bool:
        """Whether the next gradient must be differentiable itself.

        It is meant for `loss.backward(create_graph=opt.needs_graph)`, and is False unless a method
        takes exact Hessian-vector products.
        """
        return self.phase == "ascent" and self._ascent.needs_graph(self._step_state.ascents_taken)

    # Stepping.

    @through_owner
    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context for every call of the closure in the explicit form.

        Both evaluations of a finite difference draw the same random numbers from torch in it.
        `release_gradients` releases the gradients of the descent in this context alone.
        """
        step = self._step_state
        replays = self._ascent.replays(step.ascents_taken) if self.phase == "ascent" else None
        if replays and step.randomness is not None:
            step.randomness.replay()
            step.has_replayed = True
        elif replays is False:
            step.randomness = Randomness(self._devices())
        if self.phase == "ascent":
            with self._ascent.evaluation_context(step.ascents_taken, self._params()):
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
            grad_scaler: scaler whose scale the present gradients carry.

        Returns:
            True after an ascent. False, with nothing changed, if the next gradient is the
            descent's, or if no parameter has a gradient; `step()` then does nothing, as in torch.

        Raises:
            RuntimeError: the gradients are those that the last step used, `grad_scaler.unscale_`
                was called, or gradients are released and there is a scaler.
            TypeError, ValueError: a hyperparameter of a group is invalid.
        """
        self._refuse_within_closure("ascend()")
        self._step_state.skips_ascents = False
        if self.phase == "descent":
            return False
        if self.release_gradients and grad_scaler is not None and grad_scaler.is_enabled():
            raise RuntimeError(UNSCALED)
        refuse_unscaled(self, grad_scaler)
        self._check_groups()
        return self._retry_on_layout_change(lambda: self._ascend(grad_scaler))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a whole step with a closure, or the descent that ends a step without one.

        If no parameter has a gradient, nothing is done, as in torch.

        Args:
            closure: function that clears the gradients, computes the loss, calls backward and
                returns the loss. It is called as often as the method needs. After the ascents of
                an explicit step it is called once, and may do nothing.

        Returns:
            The loss of the first call, detached from its graph; None without a closure.

        Raises:
            RuntimeError: ascents are missing before a step without a closure; the closure does not
                clear earlier gradients; or an explicit step has ascents left.
            TypeError, ValueError: a hyperparameter of a group is invalid.
        """
        owner = owner_of(self)
        if owner is not self:  # a scaler sets these on the wrapper that it was given
            vars(owner).update({k: v for k, v in vars(self).items() if k in SCALER_ATTRIBUTES})
            try:
                return owner._step(closure)
            except BaseException:  # a scaler deletes them only after success
                drop_scaler_attributes(self)
                raise
            finally:
                drop_scaler_attributes(owner)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._refuse_within_closure("step()")
        self._check_groups()
        if closure is None:
            try:
                self._retry_on_layout_change(self._descend)
            except BaseException:  # a scaler deletes its attributes only after success
                drop_scaler_attributes(self)
                raise
            return None
        if "found_inf" in vars(self):
            drop_scaler_attributes(self)
            raise RuntimeError(
                "a GradScaler cannot step with a closure: take the step in its explicit form, "
                "ascend(grad_scaler=scaler) and scaler.step(opt)"
            )
        if self._step_state.ascents_taken > 0 and self.phase == "ascent":
            raise RuntimeError(
                "step(closure) takes a whole step, and one is under way that has ascents left: go "
                "on with `while opt.ascend(): closure()` and end it with step(), or go back to x "
                "with restore()"
            )
        try:
            if self.phase == "descent":  # no ascents, or all of an explicit step's are taken
                loss = self._evaluate(closure)
            else:
                self._step_state.has_closure = True
                loss = self._evaluate_first(closure)
            while self.ascend():
                self._evaluate(closure)
            self._retry_on_layout_change(self._descend)
        except BaseException:
            self._restore()
            raise
        return loss

    @through_owner
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of all parameters to None, or to 0 in place."""
        super().zero_grad(set_to_none)
        self._used.forget()
        if self._step_state.check is not None:
            self._step_state.check.forget()

    @through_owner
    @_disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Restore x bit for bit and cancel the current step.

        Parameters that `release_gradients` has updated already keep their update. Gradients taken
        at perturbed points do not count as gradients at x.

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
            max_norm: largest norm over all parameters of all groups.
            grad_scaler: scaler whose scale the gradients carry; it unscales them first.

        Returns:
            The total norm before clipping, a 0-dim float64 tensor.

        Raises:
            RuntimeError: the next gradient is an ascent's, which the methods take unclipped; or
                `release_gradients` is set.
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
            self._step_state.is_unscaled = grad_scaler.is_enabled()
        return self._clip(max_norm)

    @torch.no_grad()
    def _clip(self, max_norm: float) -> Tensor:
        """Clip to a norm in float64, because a narrower one may overflow for finite gradients."""
        gradients = conform_if_needed(self._gradients())
        norms = total_norms(gradients)
        for bucket, _ in gradients:
            factor = (max_norm / (norms[bucket.device] + 1e-6)).clamp(max=1.0)
            local_grads = [_distributed.local(cast(Tensor, p.grad)) for p in bucket.params]
            torch._foreach_mul_(local_grads, factor)
        return next(iter(norms.values()), torch.zeros((), dtype=torch.float64))

    # Copying.

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copying or pickling")
        names = ["skip_nonfinite", "release_gradients", "set_to_none", "backend"]
        names += ["_ascent", "_descent"]
        return super().__getstate__() | {name: vars(self)[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_step_state" not in vars(self):  # a copy; a loaded optimizer keeps its own
            self._start()
