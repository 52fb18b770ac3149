"""The internals of a step on parameter buckets: ascents, descent, restoration."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eigenfilter import _callers, _core, _distributed, _perturbation
from eigenfilter.optimizers._accumulation import (
    UsedGradients,
    any_nonzero,
    check_closure,
    zero_gradients,
)
from eigenfilter.optimizers._amp import AmpState
from eigenfilter.optimizers._ascents import Ascent
from eigenfilter.optimizers._buckets import (
    BucketSlice,
    BufferStore,
    Gradients,
    ParamBucket,
    ParamBuckets,
    conform_if_needed,
)
from eigenfilter.optimizers._descents import Descent
from eigenfilter.optimizers._groups import GroupedOptimizer
from eigenfilter.optimizers._hyperparameters import (
    CHECKED,
    check_scalars,
    is_zero,
    lr_is_zero,
    rho_of,
)
from eigenfilter.optimizers._randomness import Randomness
from eigenfilter.optimizers._release import UNSCALED, GradientRelease
from eigenfilter.optimizers._shards import (
    ParentOptimizer,
    are_on_other_ranks,
    refuse_ascent,
    refuse_local_scaler,
    refuse_scaled_descent,
)
from eigenfilter.optimizers._step_state import StepState, through_owner

_T = TypeVar("_T")


class StepMachine(GroupedOptimizer):
    """The internals of `EigenfilterOptimizer`, which adds the public protocol."""

    skip_nonfinite: bool
    release_gradients: bool
    set_to_none: bool
    _ascent: Ascent
    _descent: Descent

    def _start(self) -> None:
        """Set up the attributes that are never saved."""
        self._step_state = StepState(self)
        self._used = UsedGradients()
        self._checked_values: dict[
            int, list[Any]
        ] = {}  # by id of a group, the values that passed the check
        self._amp = AmpState()
        self._parent = ParentOptimizer(self)
        self._release = GradientRelease(self._descend_parameter)
        self._buckets = ParamBuckets(BufferStore(self.backend, self._descent.keys))

    @property
    @through_owner
    def phase(self) -> str:
        """The use of the next gradient: "ascent" or "descent"."""
        step = self._step_state
        ascends = step.ascents_taken < self._ascents_wanted() and not step.skips_ascents
        return "ascent" if ascends else "descent"

    @property
    def perturbed(self) -> bool:
        """Whether the parameters are perturbed."""
        return bool(self._step_state.perturbed)

    def evaluation(self) -> AbstractContextManager[None]:
        """A context for every call of the closure."""
        raise NotImplementedError

    # Ascents.

    def _ascend(self, grad_scaler: torch.amp.GradScaler | None) -> bool:
        step = self._step_state
        all_gradients = self._gradients()
        self._refuse_ascent()
        gradients = [(bucket, g) for bucket, g in all_gradients if _ascends(bucket)]
        # Other ranks may have gradients: a rank without one still joins their collectives.
        joins_others = not gradients and self._other_ranks_wait(grad_scaler)
        if step.ascents_taken == 0:
            if not all_gradients and not joins_others:
                return False
            if not step.has_closure:
                self._used.refuse()
            self._amp.begin()
        if self._buckets.are_flat:
            refuse_local_scaler(grad_scaler)
        self._amp.adopt_scale(grad_scaler, self._buckets.devices, step.ascents_taken > 0)
        if not gradients and not joins_others and step.ascents_taken == 0:
            # No parameter in a group with a radius has a gradient.
            step.skips_ascents = True
            return False
        if self.skip_nonfinite or self._amp.is_scaled:
            self._amp.check_finite(conform_if_needed(gradients), self._buckets.devices)
        self._warn_of_other_randomness()
        padded = gradients
        if self._ascent.needs_zero_gradients and step.ascents_taken == 0:
            padded = self._buckets.pad_with_zeros(gradients, _ascends)
        gradients = self._ascent.prepare(step.ascents_taken, gradients, padded, self._amp)
        _perturbation.enter(self)
        try:
            if step.ascents_taken > 0 and self._ascent.starts_from_x(step.ascents_taken):
                self._restore_buckets(
                    step.perturbed, {id(p) for bucket, _ in gradients for p in bucket.params}
                )
            for bucket_slice in self._slices(gradients, by_state=False):
                bucket = bucket_slice.bucket
                if not bucket_slice.is_perturbed:
                    bucket.backups().filled = False  # until the kernel has written them
                    step.perturbed.append(bucket)
                    step.perturbed_ids = None
                self._ascent.perturb(self._run, step.ascents_taken, bucket_slice)
                bucket.backups().filled = True
        except BaseException:
            self._restore()
            raise
        self._mark_written([bucket for bucket, _ in gradients])
        self._clear_gradients()
        step.ascents_taken += 1
        if self._ascent.replays(step.ascents_taken) and not step.has_replayed:
            step.replay_check = Randomness(self._devices())
        return True

    @torch.no_grad()
    def _restore(self) -> None:
        buckets = [bucket for bucket in self._step_state.perturbed if bucket.backups().filled]
        self._restore_buckets(buckets, self._release.updated_ids)
        self._end()

    # Helpers of ascents and descents.

    def _run(
        self, kernel: Callable[..., None], bucket_slice: BucketSlice, *args: Any, **kw: Any
    ) -> None:
        """Call a kernel on a slice; copy gradients whose layout is not the parameters'."""
        bucket = bucket_slice.bucket
        kw |= self._amp.scalars(bucket.device)
        try:
            kernel(bucket.tensors, bucket_slice.grads, *args, **kw)
        except (_core.LayoutError, TypeError):
            kernel(bucket.tensors, bucket.conform(bucket_slice.grads), *args, **kw)
        self._step_state.has_written = True

    def _slices(self, gradients: Gradients, *, by_state: bool) -> list[BucketSlice]:
        """Split buckets by perturbation and, with `by_state`, by state signature."""
        slices = []
        perturbed = self._step_state.perturbed
        for bucket, grads in gradients:
            signatures = (
                bucket.state_signatures(self._descent.state_signature) if by_state else [None]
            )
            is_uniform = not perturbed or bucket in perturbed
            if is_uniform and len(signatures) == 1:
                slices.append(BucketSlice(bucket, grads, bool(perturbed), signatures[0]))
                continue
            perturbed_ids = self._perturbed_ids()
            signatures = signatures * (len(bucket.params) // len(signatures))
            pairs = zip(bucket.params, signatures, strict=True)
            keys = [(id(p) in perturbed_ids, signature) for p, signature in pairs]
            for (is_perturbed, signature), (subset, some) in bucket.split(grads, keys).items():
                slices.append(BucketSlice(subset, some, is_perturbed, signature))
        return slices

    def _perturbed_ids(self) -> set[int]:
        """Ids of the parameters that are perturbed."""
        step = self._step_state
        if step.perturbed_ids is None:
            step.perturbed_ids = {id(p) for bucket in step.perturbed for p in bucket.params}
        return step.perturbed_ids

    def _retry_on_layout_change(self, act: Callable[[], _T]) -> _T:
        """Call `act`; on a LayoutError rebuild the buckets and call it once more.

        `model.to(dtype)` and `model.to(memory_format=...)` change parameters in place. The kernels
        notice before they write, and only a call that has written nothing is repeated.
        """
        self._step_state.has_written = False
        try:
            return act()
        except _core.LayoutError:
            if self._step_state.has_written or self.perturbed:
                raise
            self._build_buckets()
            return act()

    # The descent.

    @torch.no_grad()
    def _descend(self) -> None:
        step = self._step_state
        self._buckets.snapshot_state()  # state that released gradients have created
        gradients = self._gradients()
        if self.phase == "ascent" and gradients:
            if self._only_initializes_state(gradients):
                return
            self._require_ascents()
        if self.release_gradients and "found_inf" in vars(self):
            raise RuntimeError(UNSCALED)
        if gradients and self.release_gradients:
            self._release.warn_of_whole()
        if not gradients and not self._release.updated_ids and not self._other_ranks_wait():
            self._restore()  # a skipped batch: do nothing, as torch
            return
        if step.ascents_taken == 0:
            self._amp.begin()
        if self._buckets.are_flat:
            refuse_scaled_descent(self)
        self._amp.adopt_scaler_state(
            self,
            self._buckets.devices,
            has_ascended=step.ascents_taken > 0,
            is_unscaled=step.is_unscaled,
            is_sharded=self._buckets.are_shards,
        )
        self._descent.begin()
        self._update(gradients)
        self._mark_written([bucket for bucket, _ in gradients])
        self._amp.count_skipped()
        self._used.mark(
            [p for bucket, _ in gradients for p in (bucket.params[0], bucket.params[-1])]
        )
        self._restore_others(gradients)

    def _update(self, gradients: Gradients) -> None:
        """Update the parameters that have a gradient; errors come before the first write."""
        slices = self._slices(gradients, by_state=True)
        if self.skip_nonfinite or len(slices) > 1 or any(map(self._descent.creates_state, slices)):
            for bucket_slice in slices:
                check_scalars(bucket_slice.bucket.group, bucket_slice.bucket.device)
                bucket_slice.grads = bucket_slice.bucket.conform_if_needed(bucket_slice.grads)
        if self.skip_nonfinite:  # also without a gradient, because the other ranks wait
            grads = [(bucket_slice.bucket, bucket_slice.grads) for bucket_slice in slices]
            self._amp.check_finite(grads, self._buckets.devices)
        for bucket_slice in slices:
            self._descent.step(self._run, bucket_slice, self._amp)

    @torch.no_grad()
    def _descend_parameter(self, p: Tensor) -> None:
        """Update one parameter within the backward pass that computed its gradient."""

        def act() -> None:
            if not self._release.updated_ids:
                self._update_buckets()
                if self._step_state.ascents_taken == 0:
                    self._amp.begin()
            bucket = self._buckets.single(p)
            [signature] = bucket.state_signatures(self._descent.state_signature)
            is_perturbed = id(p) in self._perturbed_ids()
            bucket_slice = BucketSlice(bucket, [cast(Tensor, p.grad)], is_perturbed, signature)
            if self._descent.creates_state(bucket_slice):
                bucket_slice.grads = bucket.conform_if_needed(bucket_slice.grads)
            self._descent.step(self._run, bucket_slice, self._amp)
            self._mark_written([bucket])

        self._retry_on_layout_change(act)

    def _gradients(self) -> Gradients:
        """The buckets of the parameters that have a gradient, with their gradients."""
        self._update_buckets()
        return self._buckets.with_gradients()

    def _update_buckets(self) -> None:
        groups, state = self.param_groups, self.state
        if not self._buckets.are_current(groups, state) or self._descent.has_edits():
            if self.perturbed:
                raise RuntimeError(
                    "param_groups or state were changed between an ascent and its step: change "
                    "them after step() or restore()"
                )
            self._build_buckets()

    def _build_buckets(self) -> None:
        self._buckets.build(self.param_groups, self.state, self._descent.normalize_state)

    def _params(self, *, ascending: bool = False) -> list[Tensor]:
        groups = (g for g in self.param_groups if not ascending or not is_zero(rho_of(g)))
        return [p for group in groups for p in group["params"]]

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._params()}

    def _mark_written(self, buckets: list[ParamBucket]) -> None:
        """Tell autograd and FSDP that the parameters of `buckets` have changed."""
        for bucket in buckets:
            increment_version(bucket.params)
        if any(bucket.is_distributed for bucket in buckets):
            _distributed.reshard()
        if self._buckets.are_flat:
            _distributed.reshard_flat(self._buckets.flat_handles)

    def _restore_others(self, stepped: Gradients) -> None:
        """Restore the parameters that took no descent, and end the step."""
        done = {id(bucket) for bucket, _ in stepped}
        perturbed = self._step_state.perturbed
        if not all(id(bucket) in done for bucket in perturbed):
            ids = {id(p) for bucket, _ in stepped for p in bucket.params}
            self._restore_buckets(perturbed, ids | self._release.updated_ids)
        self._end()

    def _restore_buckets(self, buckets: list[ParamBucket], updated_ids: set[int]) -> None:
        """Restore the parameters of `buckets`, except those with ids in `updated_ids`."""
        if updated_ids:
            remaining = [
                (bucket, [i for i, p in enumerate(bucket.params) if id(p) not in updated_ids])
                for bucket in buckets
            ]
            buckets = [bucket.subset(indices) for bucket, indices in remaining if indices]
        for bucket in buckets:
            bucket.restore()
        self._mark_written(buckets)

    def _end(self) -> None:
        self._step_state.reset()
        self._buckets.snapshot_state()
        self._release.updated_ids.clear()
        self._ascent.forget()
        _perturbation.leave(self)

    def _evaluate_first(self, closure: Callable[[], Any]) -> Any:
        """Call a closure, which must not add its gradients to earlier ones."""
        check = None
        if self._used.are_unchanged():
            self._clear_gradients()
        else:
            check = check_closure(self._params())
        self._step_state.check = check
        try:
            loss = self._evaluate(closure)
        except BaseException:
            if check is not None:
                check.end()
            raise
        finally:
            self._step_state.check = None
        if check is not None:
            check.refuse()
        return loss

    def _refuse_within_closure(self, what: str) -> None:
        if self._step_state.evaluating:
            raise RuntimeError(
                f"{what} was called by the closure that step(closure) is evaluating: a closure "
                "calls opt.zero_grad() and backward() and returns the loss, and the step is taken "
                "around it"
            )

    def _clear_gradients(self) -> None:
        self._used.forget()
        for group in self.param_groups:
            if self.set_to_none:
                _core.clear_gradients(group["params"])
            else:
                zero_gradients(group["params"])

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        self._step_state.evaluating = True
        try:
            with torch.enable_grad(), self.evaluation():
                loss = closure()
        finally:
            self._step_state.evaluating = False
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss = loss.detach()
        self._ascent.record_loss(loss)
        return loss

    def _warn_of_other_randomness(self) -> None:
        """Warn if the second evaluation of a finite difference drew other random numbers."""
        step = self._step_state
        if (
            step.replay_check is not None
            and not step.has_replayed
            and step.replay_check.has_changed()
        ):
            warnings.warn(
                "the two sides of a finite difference saw different random numbers (dropout, "
                "augmentation): call the closure inside `with opt.evaluation():`",
                stacklevel=_callers.stacklevel(),
            )
        step.replay_check = None

    # Conditions of a step.

    def _ascents_wanted(self) -> int:
        if all(is_zero(rho_of(g)) for g in self.param_groups):
            return 0
        return self._ascent.count

    def _other_ranks_wait(self, grad_scaler: torch.amp.GradScaler | None = None) -> bool:
        """Whether other ranks, which may have gradients, wait for this one without a gradient."""
        checks = self.skip_nonfinite or (grad_scaler is not None and grad_scaler.is_enabled())
        if checks and _distributed.is_parallel():
            return True
        return are_on_other_ranks(self._params())

    def _refuse_ascent(self) -> None:
        """Raise RuntimeError where an ascent needs more than the gradients of this rank."""
        flat = self._params() if self._buckets.are_flat else []
        refuse_ascent(self, self._parent, flat, self._ascent.needs_norm)

    def _require_ascents(self) -> None:
        self._refuse_ascent()
        wanted, taken = self._ascents_wanted(), self._step_state.ascents_taken
        raise RuntimeError(
            f"step() needs {wanted} ascents before it, and {taken} were taken. Pass a closure to "
            "step() that calls opt.zero_grad() and backward(), or write `while opt.ascend(): "
            "closure()` before step(). A training loop that calls step() without a closure and "
            "cannot be changed (a framework's) can train only with rho=0.0 in every group"
        )

    def _only_initializes_state(self, gradients: Gradients) -> bool:
        """Whether this is the step with which distributed checkpointing creates the state.

        Every lr and every gradient is 0 then. The state is created as zeros.
        """
        if self.perturbed or not all(lr_is_zero(g.get("lr", 1.0)) for g in self.param_groups):
            return False
        if any_nonzero([g for _, grads in gradients for g in grads]):
            return False
        self._initialize_state(gradients)
        return True

    def _initialize_state(self, gradients: Gradients) -> None:
        for bucket, _ in gradients:
            self._descent.initialize_state(bucket)
        self._buckets.snapshot_state()

    def _check_groups(self) -> None:
        """Raise TypeError or ValueError for a hyperparameter that was changed to a bad value."""
        for group in self.param_groups:
            values = [group.get(name) for name in CHECKED]
            checked = self._checked_values.get(id(group))
            if checked is None or not all(map(operator.is_, values, checked)):
                self._check_hyperparameters(group)
                # Tensors and lists may change in place.
                if not any(isinstance(v, (Tensor, list)) for v in values):
                    self._checked_values[id(group)] = values


def _ascends(bucket: ParamBucket) -> bool:
    return not is_zero(rho_of(bucket.group))
