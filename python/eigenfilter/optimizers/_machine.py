"""The machinery of a step: ascents, the descent and the way back to x, on parts of parameters."""

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
from eigenfilter.optimizers._ascents import Ascent
from eigenfilter.optimizers._descents import Descent
from eigenfilter.optimizers._groups import GroupedOptimizer
from eigenfilter.optimizers._guard import Guard
from eigenfilter.optimizers._hyperparameters import (
    CHECKED,
    check_scalars,
    is_zero,
    lr_is_zero,
    rho_of,
)
from eigenfilter.optimizers._parts import Gradients, Part, Parts, Piece, Store, conforming
from eigenfilter.optimizers._randomness import Randomness
from eigenfilter.optimizers._release import UNSCALED, GradientRelease
from eigenfilter.optimizers._shards import (
    Parent,
    lies_elsewhere,
    refuse_ascent,
    refuse_local_scaler,
    refuse_scaled_descent,
)
from eigenfilter.optimizers._step_state import StepState, through_owner

_T = TypeVar("_T")


class StepMachine(GroupedOptimizer):
    """What `EigenfilterOptimizer` steps with. Its public methods are the protocol around it."""

    skip_nonfinite: bool
    release_gradients: bool
    set_to_none: bool
    _ascent: Ascent
    _descent: Descent

    def _start(self) -> None:
        """Set up what lives as long as this object and is never saved."""
        self._step_state = StepState(self)
        self._used = UsedGradients()
        self._good: dict[int, list[Any]] = {}  # values of groups that have been checked
        self._guard = Guard()
        self._parent = Parent(self)
        self._release = GradientRelease(self._descend_alone)
        self._parts = Parts(Store(self.backend, self._descent.keys))

    @property
    @through_owner
    def phase(self) -> str:
        """What the next gradient is for: "ascent" or "descent"."""
        step = self._step_state
        return "ascent" if step.ascended < self._ascents_wanted() and not step.plain else "descent"

    @property
    def perturbed(self) -> bool:
        """Whether the parameters are away from x."""
        return bool(self._step_state.perturbed)

    def evaluation(self) -> AbstractContextManager[None]:
        """A context for every call of the closure."""
        raise NotImplementedError

    # Ascents.

    def _ascend(self, grad_scaler: torch.amp.GradScaler | None) -> bool:
        step = self._step_state
        gradients = self._gradients()
        self._refuse_ascent()
        found = [(part, g) for part, g in gradients if _ascends(part)]
        # Without a gradient here, it goes along with ranks that may have one.
        elsewhere = not found and self._is_awaited(grad_scaler)
        if step.ascended == 0:
            if not gradients and not elsewhere:
                return False
            if not step.by_closure:
                self._used.refuse()
            self._guard.begin()
        if self._parts.are_flat:
            refuse_local_scaler(grad_scaler)
        self._guard.take_scale(grad_scaler, self._parts.devices, step.ascended > 0)
        if not found and not elsewhere and step.ascended == 0:  # nothing ascends: the descent's
            step.plain = True
            return False
        if self.skip_nonfinite or self._guard.scaled:
            self._guard.look(conforming(found), self._parts.devices)
        self._warn_of_other_randomness()
        whole = found
        if self._ascent.takes_zeros and step.ascended == 0:
            whole = self._parts.filled(found, _ascends)
        found = self._ascent.prepare(step.ascended, found, whole, self._guard)
        _perturbation.enter(self)
        try:
            if step.ascended > 0 and self._ascent.from_x(step.ascended):
                self._restore_parts(
                    step.perturbed, {id(p) for part, _ in found for p in part.params}
                )
            for piece in self._pieces(found, past=False):
                part = piece.part
                if not piece.moved:
                    part.backups().filled = False  # until the kernel has: see restore
                    step.perturbed.append(part)
                    step.perturbed_ids = None
                self._ascent.move(self._run, step.ascended, piece)
                part.backups().filled = True
        except BaseException:
            self._restore()
            raise
        self._touched([part for part, _ in found])
        self._clear_gradients()
        step.ascended += 1
        if self._ascent.replays(step.ascended) and not step.replayed:
            step.between = Randomness(self._devices())
        return True

    @torch.no_grad()
    def _restore(self) -> None:
        moved = [part for part in self._step_state.perturbed if part.backups().filled]
        self._restore_parts(moved, self._release.updated)
        self._end()

    # What ascents and descents use.

    def _run(self, kernel: Callable[..., None], piece: Piece, *args: Any, **kw: Any) -> None:
        """Call a kernel on a piece, its gradients copied to the parameters' layout if need be."""
        part = piece.part
        kw |= self._guard.scalars(part.device)
        try:
            kernel(part.tensors, piece.grads, *args, **kw)
        except (_core.LayoutError, TypeError):
            kernel(part.tensors, part.conform(piece.grads), *args, **kw)
        self._step_state.written = True

    def _pieces(self, found: Gradients, *, past: bool) -> list[Piece]:
        """Parts split by what differs: are they perturbed and, where asked for, their past."""
        pieces = []
        perturbed = self._step_state.perturbed
        for part, grads in found:
            pasts = part.pasts(self._descent.past) if past else [None]
            whole = not perturbed or part in perturbed
            if whole and len(pasts) == 1:
                pieces.append(Piece(part, grads, bool(perturbed), pasts[0]))
                continue
            away = self._away()
            pasts = pasts * (len(part.params) // len(pasts))
            keys = [(id(p) in away, at) for p, at in zip(part.params, pasts, strict=True)]
            for (is_away, at), (some, given) in part.split(grads, keys).items():
                pieces.append(Piece(some, given, is_away, at))
        return pieces

    def _away(self) -> set[int]:
        """Ids of the parameters that are perturbed."""
        step = self._step_state
        if step.perturbed_ids is None:
            step.perturbed_ids = {id(p) for part in step.perturbed for p in part.params}
        return step.perturbed_ids

    def _following_layouts(self, act: Callable[[], _T]) -> _T:
        """Act; once more with parts built again if the parameters' layouts are no longer theirs.

        `model.to(dtype)` and `model.to(memory_format=...)` change parameters in place. The kernels
        notice before they write; only what has written nothing is tried again.
        """
        self._step_state.written = False
        try:
            return act()
        except _core.LayoutError:
            if self._step_state.written or self.perturbed:
                raise
            self._build_parts()
            return act()

    # The descent.

    @torch.no_grad()
    def _descend(self) -> None:
        step = self._step_state
        self._parts.settle()  # what was released
        found = self._gradients()
        if self.phase == "ascent" and found:
            if self._primes(found):
                return
            self._require_ascents()
        if self.release_gradients and "found_inf" in vars(self):
            raise RuntimeError(UNSCALED)
        if found and self.release_gradients:
            self._release.warn_of_whole()
        if not found and not self._release.updated and not self._is_awaited():
            self._restore()  # a skipped batch: as torch, do nothing
            return
        if step.ascended == 0:
            self._guard.begin()
        if self._parts.are_flat:
            refuse_scaled_descent(self)
        self._guard.take_over(
            self,
            self._parts.devices,
            ascended=step.ascended > 0,
            unscaled=step.unscaled,
            shared=self._parts.are_shards,
        )
        self._descent.begin()
        self._update(found)
        self._touched([part for part, _ in found])
        self._guard.count()
        self._used.mark([p for part, _ in found for p in (part.params[0], part.params[-1])])
        self._restore_all_but(found)

    def _update(self, found: Gradients) -> None:
        """Update what has a gradient; any error comes before the first kernel writes."""
        pieces = self._pieces(found, past=True)
        if self.skip_nonfinite or len(pieces) > 1 or any(map(self._descent.starts, pieces)):
            for piece in pieces:
                check_scalars(piece.part.group, piece.part.device)
                piece.grads = piece.part.conforming(piece.grads)
        if self.skip_nonfinite:  # without a gradient here too: the other ranks wait for this one
            grads = [(piece.part, piece.grads) for piece in pieces]
            self._guard.look(grads, self._parts.devices)
        for piece in pieces:
            self._descent.step(self._run, piece, self._guard)

    @torch.no_grad()
    def _descend_alone(self, p: Tensor) -> None:
        """Take the descent of one parameter, within the backward pass that made its gradient."""

        def act() -> None:
            if not self._release.updated:
                self._make_parts_current()
                if self._step_state.ascended == 0:
                    self._guard.begin()
            part = self._parts.alone(p)
            [past] = part.pasts(self._descent.past)
            piece = Piece(part, [cast(Tensor, p.grad)], id(p) in self._away(), past)
            if self._descent.starts(piece):
                piece.grads = part.conforming(piece.grads)
            self._descent.step(self._run, piece, self._guard)
            self._touched([part])

        self._following_layouts(act)

    def _gradients(self) -> Gradients:
        """The parts of the parameters that have a gradient, with those."""
        self._make_parts_current()
        return self._parts.with_gradients()

    def _make_parts_current(self) -> None:
        groups, state = self.param_groups, self.state
        if not self._parts.are_current(groups, state) or self._descent.edited():
            if self.perturbed:
                raise RuntimeError(
                    "param_groups or state were changed between an ascent and its step: change "
                    "them after step() or restore()"
                )
            self._build_parts()

    def _build_parts(self) -> None:
        self._parts.build(self.param_groups, self.state, self._descent.unify)

    def _params(self, *, ascending: bool = False) -> list[Tensor]:
        groups = (g for g in self.param_groups if not ascending or not is_zero(rho_of(g)))
        return [p for group in groups for p in group["params"]]

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._params()}

    def _touched(self, parts: list[Part]) -> None:
        """Tell autograd and FSDP that the parameters of `parts` have changed."""
        for part in parts:
            increment_version(part.params)
        if any(part.is_distributed for part in parts):
            _distributed.reshard()
        if self._parts.are_flat:
            _distributed.reshard_flat(self._parts.flat_handles)

    def _restore_all_but(self, stepped: Gradients) -> None:
        """Go back to x where no descent was taken, and end the step."""
        done = {id(part) for part, _ in stepped}
        perturbed = self._step_state.perturbed
        if not all(id(part) in done for part in perturbed):
            ids = {id(p) for part, _ in stepped for p in part.params}
            self._restore_parts(perturbed, ids | self._release.updated)
        self._end()

    def _restore_parts(self, parts: list[Part], updated: set[int]) -> None:
        """Go back to x with all parameters of `parts` but those whose ids are `updated`."""
        if updated:
            left = [
                (part, [i for i, p in enumerate(part.params) if id(p) not in updated])
                for part in parts
            ]
            parts = [part.subpart(indices) for part, indices in left if indices]
        for part in parts:
            part.restore()
        self._touched(parts)

    def _end(self) -> None:
        self._step_state.reset()
        self._parts.settle()
        self._release.updated.clear()
        self._ascent.forget()
        _perturbation.leave(self)

    def _evaluate_first(self, closure: Callable[[], Any]) -> Any:
        """Call a closure whose gradients must be its own, not added to what was there before."""
        check = None
        if self._used.untouched():
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
        self._ascent.note(loss)
        return loss

    def _warn_of_other_randomness(self) -> None:
        """Warn if the second side of a finite difference drew random numbers of its own."""
        step = self._step_state
        if step.between is not None and not step.replayed and step.between.has_changed():
            warnings.warn(
                "the two sides of a finite difference saw different random numbers (dropout, "
                "augmentation): call the closure inside `with opt.evaluation():`",
                stacklevel=_callers.stacklevel(),
            )
        step.between = None

    # When a step is due.

    def _ascents_wanted(self) -> int:
        if all(is_zero(rho_of(g)) for g in self.param_groups):
            return 0
        return self._ascent.count

    def _is_awaited(self, grad_scaler: torch.amp.GradScaler | None = None) -> bool:
        """Whether other ranks, which may have gradients, wait for this one, which has none."""
        looks = self.skip_nonfinite or (grad_scaler is not None and grad_scaler.is_enabled())
        if looks and _distributed.is_parallel():
            return True
        return lies_elsewhere(self._params())

    def _refuse_ascent(self) -> None:
        """Raise RuntimeError where this rank's gradients are not enough to ascend by."""
        flat = self._params() if self._parts.are_flat else []
        refuse_ascent(self, self._parent, flat, self._ascent.takes_norm)

    def _require_ascents(self) -> None:
        self._refuse_ascent()
        wanted, taken = self._ascents_wanted(), self._step_state.ascended
        raise RuntimeError(
            f"step() needs {wanted} ascents before it, and {taken} were taken. Pass a closure to "
            "step() that calls opt.zero_grad() and backward(), or write `while opt.ascend(): "
            "closure()` before step(). A training loop that calls step() without a closure and "
            "cannot be changed (a framework's) can train only with rho=0.0 in every group"
        )

    def _primes(self, found: Gradients) -> bool:
        """Whether this is the step by which distributed checkpointing makes the state exist.

        Every lr is 0 then, and every gradient. The state is made, as zeros.
        """
        if self.perturbed or not all(lr_is_zero(g.get("lr", 1.0)) for g in self.param_groups):
            return False
        if any_nonzero([g for _, grads in found for g in grads]):
            return False
        self._prime(found)
        return True

    def _prime(self, found: Gradients) -> None:
        for part, _ in found:
            self._descent.prime(part)
        self._parts.settle()

    def _check_groups(self) -> None:
        """Raise TypeError or ValueError for a hyperparameter that was changed to a bad value."""
        for group in self.param_groups:
            values = [group.get(name) for name in CHECKED]
            good = self._good.get(id(group))
            if good is None or not all(map(operator.is_, values, good)):
                self._check_hyperparameters(group)
                if not any(isinstance(v, (Tensor, list)) for v in values):  # which change in place
                    self._good[id(group)] = values


def _ascends(part: Part) -> bool:
    return not is_zero(rho_of(part.group))
