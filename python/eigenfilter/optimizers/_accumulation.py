"""Checks that an evaluation does not add its gradients to earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _core, _distributed

_USED_VERSION = "_eigenfilter_used"
_PRIOR_VERSION = "_eigenfilter_seen"

NOT_CLEARED = (
    "gradients that were there before the closure are still part of those it left, as in gradient "
    "accumulation: the ascent would follow their sum, and the descent only what the closure "
    "computes. No parameter was changed. Put the whole accumulation, opt.zero_grad() and the "
    "backward() of every micro-batch, inside the closure; or, if those gradients are left over, "
    "call opt.zero_grad() before the step"
)
NOT_COMPUTED = (
    "the closure left the gradients that were there before it as they are: it has to evaluate the "
    "loss again at every call, because the method needs the gradient at other points too. No "
    "parameter was changed. Pass a closure that calls opt.zero_grad() and backward() (all "
    "micro-batches of an accumulation inside it), or step without one: "
    "`while opt.ascend(): closure()`, then opt.step()"
)
ALREADY_USED = (
    "ascend() needs the gradient at the present point, and the gradients are those that the last "
    "step used: clear them with opt.zero_grad() and call backward() before ascend()"
)


class UsedGradients:
    """Detects that the gradients are still those of the last descent, and were not cleared.

    A program that clears its gradients clears all of them, so checking the first and the last
    suffices. The mark is an attribute of the gradient itself and keeps no memory alive.
    """

    def __init__(self) -> None:
        self._probes: list[Tensor] = []
        self._check: ClosureCheck | None = None  # of the closure that is running

    def mark(self, params: Sequence[Tensor]) -> None:
        """Mark the gradients of these parameters as used."""
        self._probes = [params[0], params[-1]] if params else []
        for g in self._grads():
            setattr(g, _USED_VERSION, _version(g))

    def forget(self) -> None:
        """Drop the marks: the gradients have been cleared, and the next ones are new."""
        self._probes = []
        if self._check is not None:
            self._check.forget()

    @contextmanager
    def checking(self, params: list[Tensor]) -> Iterator[None]:
        """A context for a closure, which must not add its gradients to earlier ones.

        Raises:
            RuntimeError: it has added to them, or has kept them.
        """
        check = self._check = check_closure(params)
        try:
            yield
        except BaseException:
            if check is not None:
                check.end()
            raise
        finally:
            self._check = None
        if check is not None:
            check.refuse()

    def are_unchanged(self) -> bool:
        """Whether used gradients have been neither cleared nor written since."""
        grads = self._grads()
        return bool(grads) and all(map(_is_unchanged, grads))

    def refuse(self) -> None:
        """Raise RuntimeError if an ascent would use a gradient a second time."""
        if any(map(_is_unchanged, self._grads())):
            raise RuntimeError(ALREADY_USED)

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._probes if p.grad is not None]


def _is_unchanged(g: Tensor) -> bool:
    used: int | None = getattr(g, _USED_VERSION, None)
    return used is not None and used == _version(g)


def _version(g: Tensor) -> int:
    """The version of a gradient's local shard, to which FSDP2 adds; 0 for inference tensors."""
    local = _distributed.local(g)
    return 0 if local.is_inference() else local._version


class ClosureCheck:
    """Detects that a closure did not clear the gradients that existed before it.

    Hooks check each parameter's gradient just before backward first adds to it, and record the
    result just after. They cost time, and are used only if there are gradients that no step used.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self._params = params
        # By id: whether a pending addition meets an older gradient, and whether the first one did.
        self._meets: dict[int, bool] = {}
        self._mixed: dict[int, bool] = {}
        for g in grads:
            setattr(g, _PRIOR_VERSION, _version(g))
        self._hooks = [hook for p in params if p.requires_grad for hook in self._watch(p)]

    def _watch(self, p: Tensor) -> tuple[Any, Any]:
        key = id(p)

        def before_accumulation(_: Tensor) -> None:
            # torch.autograd.grad calls it too, and adds nothing.
            if key not in self._mixed:
                g = p.grad
                self._meets[key] = g is not None and hasattr(g, _PRIOR_VERSION) and any_nonzero([g])

        def after_accumulation(_: Tensor) -> None:
            self._mixed.setdefault(key, self._meets.get(key, False))

        return (
            p.register_hook(before_accumulation),  # type: ignore[no-untyped-call]
            p.register_post_accumulate_grad_hook(after_accumulation),  # type: ignore[no-untyped-call]
        )

    def end(self) -> tuple[bool, bool]:
        """End the check.

        Where no hook is called (FSDP2, gradients written by hand), a gradient that was changed in
        place counts as mixed.

        Returns:
            Whether new gradients were added to older ones, and whether older ones stayed unchanged.
        """
        for hook in self._hooks:
            hook.remove()
        changed: list[Tensor] = []
        same: list[Tensor] = []
        for p in self._params:
            g = p.grad
            if g is None or not hasattr(g, _PRIOR_VERSION):
                continue
            before = getattr(g, _PRIOR_VERSION)
            delattr(g, _PRIOR_VERSION)
            if id(p) not in self._mixed:
                (same if _version(g) == before else changed).append(g)
        return any(self._mixed.values()) or any_nonzero(changed), any_nonzero(same)

    def forget(self) -> None:
        """Record that all gradients have just been cleared in place."""
        self._meets.clear()
        self._mixed.clear()
        for p in self._params:
            if p.grad is not None and hasattr(p.grad, _PRIOR_VERSION):
                delattr(p.grad, _PRIOR_VERSION)

    def refuse(self) -> None:
        """End the check; raise RuntimeError if older gradients were mixed with new ones or kept."""
        mixed, left = self.end()
        if left and not mixed and not self._mixed:
            raise RuntimeError(NOT_COMPUTED)
        if mixed or left:
            raise RuntimeError(NOT_CLEARED)


def check_closure(params: list[Tensor]) -> ClosureCheck | None:
    """A check for the closure that is called next; None if all gradients are None or 0."""
    grads, missing = _core.gradients(params)
    if missing == len(grads):
        return None
    some = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
    if not any_nonzero([g for _, g in some]):
        return None
    return ClosureCheck([p for p, _ in some], [g for _, g in some])


def any_nonzero(grads: Sequence[Tensor]) -> bool:
    """Whether any element is not 0 (NaN is not 0); waits for the device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        g = _distributed.local(g).detach()
        values = g if g.layout == torch.strided else g.coalesce().values()
        if values.numel():
            by_device.setdefault(values.device, []).append(values)
    for each in by_device.values():
        norms = torch._foreach_norm(each, float("inf"))
        if bool((torch.stack([n.double() for n in norms]) != 0).any()):
            return True
    return False


@torch.no_grad()
def zero_gradients(params: Sequence[Tensor]) -> None:
    """Fill the gradients with 0 in place, as zero_grad(set_to_none=False) does."""
    grads, _ = _core.gradients(list(params))
    present = [g for g in grads if g is not None]
    for g in present:
        if g.grad_fn is not None:
            g.detach_()
        elif g.requires_grad:
            g.requires_grad_(False)
    if present:
        torch._foreach_zero_(present)
