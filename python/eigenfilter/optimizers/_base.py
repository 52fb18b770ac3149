"""The machine every optimizer steps with: ascents, descent, restoration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # does not import the compiler, as torch.compiler does
from torch.autograd.graph import increment_version

from eigenfilter import _callers, _core, _distributed, _perturbation, kernels
from eigenfilter.optimizers._ascents import Ascent, total_norms
from eigenfilter.optimizers._descents import Descent
from eigenfilter.optimizers._groups import GroupedOptimizer
from eigenfilter.optimizers._guard import Guard, drop_handed_over, refuse_unscaled
from eigenfilter.optimizers._hyperparameters import check_scalars, is_zero, lr_is_zero
from eigenfilter.optimizers._parts import Gradients, Part, Parts, Piece, Store, conforming
from eigenfilter.optimizers._randomness import Randomness
from eigenfilter.optimizers._release import UNSCALED, GradientRelease

_T = TypeVar("_T")


class EigenfilterOptimizer(GroupedOptimizer):
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
    ) -> None:
        if skip_nonfinite and release_gradients:
            raise ValueError(
                "release_gradients applies each gradient before the next is made, and "
                "skip_nonfinite needs all of them first: choose one"
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

    def _start(self) -> None:
        """Set up what lives as long as this object and is never saved."""
        self._ascended = 0  # ascents taken in the step under way
        self._written = False  # by the present call
        self._moved: list[Part] = []  # parts that are away from x, none twice
        self._away_ids: set[int] | None = None  # of their parameters, once asked for
        self._guard = Guard()
        self._release = GradientRelease(self)
        self._parts = Parts(Store(self.backend, self._descent.keys))
        self._randomness: Randomness | None = None  # before an evaluation that is drawn again
        self._between: Randomness | None = None  # after an ascent whose evaluation should be
        self._replayed = False

    # What users see of a step under way.

    @property
    def phase(self) -> str:
        """What the next gradient is for: "ascent" or "descent"."""
        return "ascent" if self._ascended < self._ascents_wanted() else "descent"

    @property
    def perturbed(self) -> bool:
        """Whether the parameters are away from x."""
        return bool(self._moved)

    @property
    def skipped(self) -> int:
        """How many steps were skipped for a gradient that was not finite (synchronises)."""
        return self._guard.skipped()

    @property
    def needs_graph(self) -> bool:
        """Whether the next gradient has to be differentiable itself.

        For `loss.backward(create_graph=opt.needs_graph)`; False unless a method takes exact
        Hessian-vector products.
        """
        return self.phase == "ascent" and self._ascent.needs_graph(self._ascended)

    # Stepping.

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context for every call of the closure in the explicit form.

        Where a method takes finite differences, torch's random numbers are the same on both sides.
        With `release_gradients` the descent's gradients are released here and nowhere else.
        """
        replays = self._ascent.replays(self._ascended) if self.phase == "ascent" else None
        if replays and self._randomness is not None:
            self._randomness.replay()
            self._replayed = True
        elif replays is False:
            self._randomness = Randomness(self._devices())
        if not self.release_gradients or self.phase == "ascent":
            yield
            return
        with self._release.during_backward(self._params()):
            yield

    @_disable_dynamo
    @torch.no_grad()
    def ascend(self, grad_scaler: torch.amp.GradScaler | None = None) -> bool:
        """Move to the next point where a gradient is needed, and clear the gradients.

        Args:
            grad_scaler: the scaler whose scale the present gradients carry.

        Returns:
            True after a move; False, with nothing done, when the next gradient is the descent's.

        Raises:
            RuntimeError: no parameter has a gradient, `grad_scaler.unscale_` was called, or
                gradients are released and there is a scaler.
        """
        if self.phase == "descent":
            return False
        if self.release_gradients and grad_scaler is not None and grad_scaler.is_enabled():
            raise RuntimeError(UNSCALED)
        refuse_unscaled(self, grad_scaler)
        return self._following_layouts(lambda: self._ascend(grad_scaler))

    def _ascend(self, grad_scaler: torch.amp.GradScaler | None) -> bool:
        gradients = self._gradients()
        found = [(part, g) for part, g in gradients if not is_zero(part.group["rho"])]
        if not gradients:
            raise RuntimeError(
                "ascend() needs the gradient at the present point: call the closure, which runs "
                "loss.backward(), before each ascend() and after each that returned True"
            )
        if self._ascended == 0:
            self._guard.begin()
        self._guard.take_scale(grad_scaler, gradients, self._ascended > 0)
        if not found:  # nothing that ascends has a gradient: it is the descent's
            self._ascended = self._ascents_wanted()
            return False
        if self.skip_nonfinite or self._guard.scaled:
            self._guard.look(conforming(found))
        self._warn_of_other_randomness()
        found = self._ascent.prepare(self._ascended, found, self._guard)
        _perturbation.enter(self)
        try:
            for piece in self._pieces(found, past=False):
                part = piece.part
                if not piece.moved:
                    part.backups().filled = False  # until the kernel has: see restore
                    self._moved.append(part)
                    self._away_ids = None
                self._ascent.move(self._run, self._ascended, piece)
                part.backups().filled = True
        except BaseException:
            self.restore()
            raise
        self._touched([part for part, _ in found])
        for group in self.param_groups:
            _core.clear_gradients(group["params"])
        self._ascended += 1
        if self._ascent.replays(self._ascended) and not self._replayed:
            self._between = Randomness(self._devices())
        return True

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step: the whole one with a closure, else its end, the descent.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.
                It is called as often as the method needs.

        Returns:
            The first call's loss, detached if it has a graph; None without a closure.

        Raises:
            RuntimeError: without a closure, the gradient that is due is not there (unless every lr
                is 0); with one, an explicit step is under way.
        """
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
        if self.perturbed:
            raise RuntimeError(
                "step(closure) takes a whole step, and one is under way: end it with step(), or go "
                "back to x with restore()"
            )
        try:
            loss = self._evaluate(closure)
            while self.ascend():
                self._evaluate(closure)
            self._following_layouts(self._descend)
        except BaseException:
            self.restore()
            raise
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Go back to x, bit for bit, from anywhere; the step under way is forgotten.

        Parameters that have been updated already (`release_gradients`) stay so.
        """
        moved = [part for part in self._moved if part.backups().filled]
        self._restore_parts(moved, self._release.updated)
        self._end()

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
        if self.phase == "ascent":
            raise RuntimeError(
                "clip_grad_norm_ clips the descent gradient: call it after the ascents, just "
                "before step()"
            )
        if grad_scaler is not None:
            grad_scaler.unscale_(self)
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

    # What ascents and descents use.

    def _run(self, kernel: Callable[..., None], piece: Piece, *args: Any, **kw: Any) -> None:
        """Call a kernel on a piece, its gradients copied to the parameters' layout if need be."""
        part = piece.part
        kw |= self._guard.scalars(part.device)
        try:
            kernel(part.tensors, piece.grads, *args, **kw)
        except (_core.LayoutError, TypeError):
            kernel(part.tensors, part.conform(piece.grads), *args, **kw)
        self._written = True

    def _pieces(self, found: Gradients, *, past: bool) -> list[Piece]:
        """Parts split by what differs: are they away from x and, where asked for, their past."""
        pieces = []
        for part, grads in found:
            pasts = part.pasts(self._descent.past) if past else [None]
            whole = not self._moved or part in self._moved
            if whole and len(pasts) == 1:
                pieces.append(Piece(part, grads, bool(self._moved), pasts[0]))
                continue
            away = self._away()
            pasts = pasts * (len(part.params) // len(pasts))
            keys = [(id(p) in away, at) for p, at in zip(part.params, pasts, strict=True)]
            for (is_away, at), (some, given) in part.split(grads, keys).items():
                pieces.append(Piece(some, given, is_away, at))
        return pieces

    def _away(self) -> set[int]:
        """Ids of the parameters that are away from x."""
        if self._away_ids is None:
            self._away_ids = {id(p) for part in self._moved for p in part.params}
        return self._away_ids

    def _following_layouts(self, act: Callable[[], _T]) -> _T:
        """Act; once more with parts built anew if the parameters' layouts are no longer theirs.

        `model.to(dtype)` and `model.to(memory_format=...)` change parameters in place. The kernels
        notice before they write; only what has written nothing is tried again.
        """
        self._written = False
        try:
            return act()
        except _core.LayoutError:
            if self._written or self.perturbed:
                raise
            self._build_parts()
            return act()

    # The descent.

    @torch.no_grad()
    def _descend(self) -> None:
        if not self._only_primes():
            self._require_ascents()
        self._parts.settle()  # what was released
        found = self._gradients()
        if self.release_gradients and "found_inf" in vars(self):
            raise RuntimeError(UNSCALED)
        if not found and not self._release.updated and not self._only_primes():
            raise RuntimeError(
                "step() needs the gradient of the descent, and no parameter has one: run the "
                "closure, which calls loss.backward(), before step()"
            )
        if found and self.release_gradients and not self._only_primes():
            self._release.warn_of_whole()
        if self._ascended == 0:
            self._guard.begin()
        self._guard.take_over(self, found, self._ascended > 0)
        self._update(found)
        self._touched([part for part, _ in found])
        self._guard.count()
        self._restore_all_but(found)

    def _update(self, found: Gradients) -> None:
        """Update what has a gradient; any error comes before the first kernel writes."""
        pieces = self._pieces(found, past=True)
        if self.skip_nonfinite or len(pieces) > 1:
            for piece in pieces:
                check_scalars(piece.part.group, piece.part.device)
                piece.grads = piece.part.conforming(piece.grads)
        if self.skip_nonfinite and pieces:
            self._guard.look([(piece.part, piece.grads) for piece in pieces])
        for piece in pieces:
            self._descent.step(self._run, piece, self._guard)

    @torch.no_grad()
    def _descend_alone(self, p: Tensor) -> None:
        """Take the descent of one parameter, within the backward pass that made its gradient."""

        def act() -> None:
            if not self._release.updated:
                self._make_parts_current()
                if self._ascended == 0:
                    self._guard.begin()
            part = self._parts.alone(p)
            [past] = part.pasts(self._descent.past)
            piece = Piece(part, [cast(Tensor, p.grad)], id(p) in self._away(), past)
            self._descent.step(self._run, piece, self._guard)
            self._touched([part])

        self._following_layouts(act)

    def _gradients(self) -> Gradients:
        """The parts of the parameters that have a gradient, with those."""
        self._make_parts_current()
        return self._parts.with_gradients()

    def _make_parts_current(self) -> None:
        if not self._parts.are_current(self.param_groups, self.state):
            if self.perturbed:
                raise RuntimeError(
                    "param_groups or state were changed between an ascent and its step: change "
                    "them after step() or restore()"
                )
            self._build_parts()

    def _build_parts(self) -> None:
        self._parts.build(self.param_groups, self.state, self._descent.unify)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._params()}

    def _touched(self, parts: list[Part]) -> None:
        """Tell autograd and FSDP2 that the parameters of `parts` have changed."""
        for part in parts:
            increment_version(part.params)
        if any(part.is_distributed for part in parts):
            _distributed.reshard()

    def _restore_all_but(self, stepped: Gradients) -> None:
        """Go back to x where no descent was taken, and end the step."""
        done = {id(part) for part, _ in stepped}
        if not all(id(part) in done for part in self._moved):
            ids = {id(p) for part, _ in stepped for p in part.params}
            self._restore_parts(self._moved, ids | self._release.updated)
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
        self._moved, self._away_ids, self._ascended = [], None, 0
        self._parts.settle()
        self._release.updated.clear()
        self._ascent.forget()
        self._randomness = self._between = None
        self._replayed = False
        _perturbation.leave(self)

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad(), self.evaluation():
            loss = closure()
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss = loss.detach()
        self._ascent.note(loss)
        return loss

    def _warn_of_other_randomness(self) -> None:
        """Warn if the second side of a finite difference drew random numbers of its own."""
        if self._between is not None and not self._replayed and self._between.has_changed():
            warnings.warn(
                "the two sides of a finite difference saw different random numbers (dropout, "
                "augmentation): call the closure inside `with opt.evaluation():`",
                stacklevel=_callers.stacklevel(),
            )
        self._between = None

    # When a step is due.

    def _ascents_wanted(self) -> int:
        if all(is_zero(g.get("rho", 0.0)) for g in self.param_groups):
            return 0
        return self._ascent.count

    def _require_ascents(self) -> None:
        if self.phase == "ascent":
            raise RuntimeError(
                f"step() needs {self._ascents_wanted()} ascents before it, and {self._ascended} "
                "were taken: pass the closure to step(), or write `while opt.ascend(): closure()`"
            )

    def _only_primes(self) -> bool:
        """Whether every lr is 0: distributed checkpointing makes the state exist by such a step."""
        return not self.perturbed and all(lr_is_zero(g.get("lr", 1.0)) for g in self.param_groups)

    # Copying.

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copying or pickling")
        names = ("skip_nonfinite", "release_gradients", "backend", "_ascent", "_descent")
        return super().__getstate__() | {name: vars(self)[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_parts" not in vars(self):  # a copy; a load keeps backups and counts
            self._start()
