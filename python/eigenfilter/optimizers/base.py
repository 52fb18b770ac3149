"""The step protocol of every optimizer: ascents, descent, restoration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # does not import the compiler, as torch.compiler does

from eigenfilter import _perturbation
from eigenfilter.optimizers import _shards, amp
from eigenfilter.optimizers._buffers import refuse_overlap
from eigenfilter.optimizers._groups import OWN_OPTIONS, GroupedOptimizer
from eigenfilter.optimizers._step_state import owner_of, retry_on_layout_change, through_owner
from eigenfilter.optimizers.buckets import Gradients, conform_if_needed
from eigenfilter.optimizers.hyperparameters import complete_options
from eigenfilter.optimizers.perturbation import Perturbation
from eigenfilter.optimizers.updates import Update


class EigenfilterOptimizer(GroupedOptimizer):
    """Base of the optimizers: an update at x whose gradient is taken at a perturbed point.

        closure()
        while opt.ascend():     # perturbs the parameters to where the next gradient is needed
            closure()
        opt.step()              # restores x exactly and applies the update

    or, with torch's contract, `loss = opt.step(closure)`. See docs/optimizers.md.

    Args:
        params: parameters, named parameters or groups, as for torch.optim.Optimizer.
        defaults: default hyperparameters of the groups.
        perturbation: perturbs the parameters before the descent.
        update: updates the parameters at x.
        options: see `Options`.
    """

    # A GradScaler leaves the gradients scaled, and sets grad_scale and found_inf on the optimizer.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        perturbation: Perturbation,
        update: Update,
        options: Mapping[str, Any],
    ) -> None:
        values = complete_options(options, type(self).__name__)
        defaults = defaults | {name: values[name] for name in update.group_options}
        vars(self).update({name: values[name] for name in OWN_OPTIONS})
        self.perturbation = perturbation
        self._update = update
        self._start()
        super().__init__(params, defaults)
        refuse_overlap(self.param_groups)
        self._constructed = True
        if self._ascents_wanted() > 0:
            self._parent.refuse_ascent(self, self._params(), perturbation.needs_norm)
        self._refuse_norm(self._params())

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
        return bool(owner_of(self)._begin_ascent(grad_scaler, self))

    def _begin_ascent(self, grad_scaler: torch.amp.GradScaler | None, caller: Any) -> bool:
        self._step_state.refuse_within_closure("ascend()")
        self._step_state.skips_ascents = False
        if self.phase == "descent":
            return False
        try:
            if self.release_gradients:
                self._release.refuse_scaler(grad_scaler)
            amp.refuse_unscaled((self, caller), grad_scaler)
            self._check_groups()
            return self._ascend(grad_scaler)
        except BaseException:
            if self._release.ascended_ids:  # backward has begun the ascent
                self._restore()
            raise

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
        if owner is not self:  # a scaler has set its attributes on the wrapper that it was given
            amp.copy_scaler_attributes(self, owner)
        try:
            return owner._step(closure)
        except BaseException:  # a scaler deletes them only after success
            amp.drop_scaler_attributes(self)
            raise
        finally:
            if owner is not self:
                amp.drop_scaler_attributes(owner)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._step_state.refuse_within_closure("step()")
        self._check_groups()
        if closure is None:
            return self._descend()
        amp.refuse_closure(self)
        if self.phase == "ascent":
            self._step_state.refuse_begun()
        try:
            loss = self._evaluate_first(closure)
            while self.ascend():
                self._evaluate(closure)
            self._descend()
        except BaseException:
            self._restore()
            raise
        return loss

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
        self._step_state.refuse_within_closure("restore()")
        if self.perturbed:
            self._used.mark(self._params())
        self._restore()

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        self._step_state.evaluating = True
        try:
            with torch.enable_grad(), self.evaluation():
                loss = closure()
        finally:
            self._step_state.evaluating = False
        loss = loss.detach() if isinstance(loss, Tensor) and loss.requires_grad else loss
        self.perturbation.record_loss(loss)
        return loss

    def _evaluate_first(self, closure: Callable[[], Any]) -> Any:
        """Evaluate; for an ascent, refuse a closure that adds its gradients to earlier ones."""
        if self.phase == "descent":  # no ascents, or all of an explicit step's are taken
            return self._evaluate(closure)
        self._step_state.has_closure = True
        if self._used.are_unchanged():
            self._clear_gradients()
            return self._evaluate(closure)
        with self._used.checking(self._params()):
            return self._evaluate(closure)

    # Ascents.

    @retry_on_layout_change
    def _ascend(self, grad_scaler: torch.amp.GradScaler | None) -> bool:
        step, buckets, release = self._step_state, self._buckets, self._release
        all_gradients = buckets.with_gradients(self)
        release.check_ascent(self, all_gradients)
        self._refuse_ascent()
        gradients = [(bucket, g) for bucket, g in all_gradients if bucket.ascends]
        # Other ranks may have gradients: a rank without one still joins their collectives.
        joins_others = not gradients and self._other_ranks_wait(grad_scaler)
        joins_others = joins_others or bool(release.ascended_ids)
        if step.ascents_taken == 0:
            if not all_gradients and not joins_others:
                return False
            if not step.has_closure:
                self._used.refuse()
            self._amp.begin()
        _shards.refuse_local_scaler(grad_scaler, buckets.are_flat)
        self._amp.adopt_scale(grad_scaler, buckets.devices, step)
        if not gradients and not joins_others and step.ascents_taken == 0:
            step.skips_ascents = True  # no parameter in a group with a radius has a gradient
            return False
        if self.skip_nonfinite or self._amp.is_scaled:
            self._amp.check_finite(conform_if_needed(gradients), buckets.devices)
        self._perturb(gradients, step.ascents_taken)
        self._clear_gradients()
        step.with_local_gradients.clear()
        release.ascended_ids.clear()
        step.ascents_taken += 1
        return True

    def _perturb(self, gradients: Gradients, index: int) -> None:
        perturbation, buckets = self.perturbation, self._buckets
        pads = perturbation.needs_zero_gradients and index == 0
        if perturbation.needs_norm:
            gradients = conform_if_needed(gradients)
        padded = buckets.pad_with_zeros(gradients) if pads else gradients
        gradients = perturbation.prepare(index, gradients, padded, self._amp)
        _perturbation.enter(self)
        try:
            if index > 0 and perturbation.starts_from_x(index):
                buckets.restore(without=gradients, except_ids=self._release.ascended_ids)
            buckets.perturb(gradients, functools.partial(perturbation.perturb, index))
        except BaseException:
            self._restore()
            raise
        buckets.mark_written([bucket for bucket, _ in gradients])

    @torch.no_grad()
    def _restore(self) -> None:
        self._buckets.restore(except_ids=self._release.updated_ids)
        self._end()

    def _end(self) -> None:
        self._step_state.reset()
        self._buckets.end_step()
        self._release.forget()
        self.perturbation.forget()
        _perturbation.leave(self)

    # The descent.

    @retry_on_layout_change
    @torch.no_grad()
    def _descend(self) -> None:
        step, buckets, release = self._step_state, self._buckets, self._release
        buckets.store.snapshot_if_changed()  # state that released gradients have created
        gradients = buckets.with_gradients(self)
        self._refuse_norm(self._params() if buckets.are_flat else [])
        release.refuse_unfinished(gradients)
        if self.phase == "ascent" and gradients:
            if self._only_initializes_state(gradients):
                return
            self._refuse_ascent()
            step.refuse_missing_ascents(self._ascents_wanted())
        if gradients or release.updated_ids:
            step.refuse_local_gradients()
        if self.release_gradients:
            release.check_descent(self, bool(gradients) and not step.skips_ascents)
        if not gradients and not release.updated_ids and not self._other_ranks_wait():
            self._restore()  # a skipped batch: do nothing, as torch
            return
        if step.ascents_taken == 0:
            self._amp.begin()
        _shards.refuse_scaled_descent(self, buckets.are_flat)
        self._amp.adopt_scaler_state(self, buckets.devices, step, are_shards=buckets.are_shards)
        with self._update.whole_step(buckets, self._amp):
            self._apply(gradients)
        buckets.mark_written([bucket for bucket, _ in gradients])
        self._amp.count_skipped()
        self._used.mark([p for b, _ in gradients for p in (b.params[0], b.params[-1])])
        buckets.restore(gradients, release.updated_ids)
        self._end()

    def _apply(self, gradients: Gradients) -> None:
        """Update the parameters that have a gradient; errors come before the first write."""
        slices = self._buckets.slices(gradients, by_state=True)
        if self.skip_nonfinite or len(slices) > 1 or any(map(self._update.writes_first, slices)):
            for bucket_slice in slices:
                bucket_slice.check()
        if self.skip_nonfinite:  # also without a gradient, because the other ranks wait
            self._amp.check_finite([(s.bucket, s.grads) for s in slices], self._buckets.devices)
        for bucket_slice in slices:
            self._update.step(bucket_slice)
