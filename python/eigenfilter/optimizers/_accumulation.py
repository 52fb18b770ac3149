"""Gradients that were there before an evaluation: used up, or about to be mixed with new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _core, _distributed

_USED = "_eigenfilter_used"
_SEEN = "_eigenfilter_seen"

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
USED = (
    "ascend() needs the gradient at the present point, and the gradients are those that the last "
    "step used: clear them with opt.zero_grad() and call backward() before ascend()"
)


class UsedGradients:
    """Knows whether the gradients are still those of the last descent, which nobody cleared.

    A program that clears its gradients clears all of them, so that two tell: the first and the
    last. What was used is noted on the gradient itself, which keeps no memory alive.
    """

    def __init__(self) -> None:
        self._probes: list[Tensor] = []

    def mark(self, params: Sequence[Tensor]) -> None:
        """Note that the gradients of these parameters have been used."""
        self._probes = [params[0], params[-1]] if params else []
        for g in self._grads():
            setattr(g, _USED, _version(g))

    def forget(self) -> None:
        """The gradients have been cleared: what is there next is new, the same tensor too."""
        self._probes = []

    def untouched(self) -> bool:
        """Whether the gradients were used and have been neither cleared nor written since."""
        grads = self._grads()
        return bool(grads) and all(map(_is_untouched, grads))

    def refuse(self) -> None:
        """Raise RuntimeError where an ascent would follow a gradient that was used already."""
        if any(map(_is_untouched, self._grads())):
            raise RuntimeError(USED)

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._probes if p.grad is not None]


def _is_untouched(g: Tensor) -> bool:
    used: int | None = getattr(g, _USED, None)
    return used is not None and used == _version(g)


def _version(g: Tensor) -> int:
    """Counts the writes, which a gradient made in inference mode does not.

    FSDP2 adds to the local shard of a gradient.
    """
    local = _distributed.local(g)
    return 0 if local.is_inference() else local._version


class ClosureCheck:
    """Tells whether a closure cleared the gradients that were there before it.

    The first gradient that backward adds to a parameter's meets what the closure has left there:
    hooks look just before and confirm just after. They cost time for each parameter, and are used
    only where gradients are there that no step has used.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self._params = params
        self._meets: dict[int, bool] = {}  # by id: what a gradient met that is not added yet
        self._mixed: dict[int, bool] = {}  # did the first that was added meet an older one
        for g in grads:
            setattr(g, _SEEN, _version(g))
        self._hooks = [hook for p in params if p.requires_grad for hook in self._watch(p)]

    def _watch(self, p: Tensor) -> tuple[Any, Any]:
        key = id(p)

        def arrive(_: Tensor) -> None:  # also for torch.autograd.grad, which adds nothing
            if key not in self._mixed:
                g = p.grad
                self._meets[key] = g is not None and hasattr(g, _SEEN) and any_nonzero([g])

        def added(_: Tensor) -> None:
            self._mixed.setdefault(key, self._meets.get(key, False))

        return (
            p.register_hook(arrive),  # type: ignore[no-untyped-call]
            p.register_post_accumulate_grad_hook(added),  # type: ignore[no-untyped-call]
        )

    def end(self) -> tuple[bool, bool]:
        """End the check: were gradients mixed with older ones, were older ones left as they were.

        Where no hook is called (FSDP2, gradients written by hand), a gradient that was changed
        where it lies counts as mixed.
        """
        for hook in self._hooks:
            hook.remove()
        changed: list[Tensor] = []
        same: list[Tensor] = []
        for p in self._params:
            g = p.grad
            if g is None or not hasattr(g, _SEEN):
                continue
            before = getattr(g, _SEEN)
            delattr(g, _SEEN)
            if id(p) not in self._mixed:
                (same if _version(g) == before else changed).append(g)
        return any(self._mixed.values()) or any_nonzero(changed), any_nonzero(same)

    def forget(self) -> None:
        """All gradients that are there have just been cleared where they lie."""
        self._meets.clear()
        self._mixed.clear()
        for p in self._params:
            if p.grad is not None and hasattr(p.grad, _SEEN):
                delattr(p.grad, _SEEN)

    def refuse(self) -> None:
        """End the check; raise RuntimeError if gradients were mixed, or left as they were."""
        mixed, left = self.end()
        if left and not mixed and not self._mixed:
            raise RuntimeError(NOT_COMPUTED)
        if mixed or left:
            raise RuntimeError(NOT_CLEARED)


def check_closure(params: list[Tensor]) -> ClosureCheck | None:
    """A check of a closure that is about to be called; None where all gradients are None or 0."""
    grads, missing = _core.gradients(params)
    if missing == len(grads):
        return None
    some = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
    if not any_nonzero([g for _, g in some]):
        return None
    return ClosureCheck([p for p, _ in some], [g for _, g in some])


def any_nonzero(grads: Sequence[Tensor]) -> bool:
    """Whether an element is not 0 (NaN is not 0); waits for the device."""
    found: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        g = _distributed.local(g).detach()
        values = g if g.layout == torch.strided else g.coalesce().values()
        if values.numel():
            found.setdefault(values.device, []).append(values)
    for each in found.values():
        norms = torch._foreach_norm(each, float("inf"))
        if bool((torch.stack([n.double() for n in norms]) != 0).any()):
            return True
    return False


@torch.no_grad()
def zero_gradients(params: Sequence[Tensor]) -> None:
    """Fill the gradients with 0 where they lie, as zero_grad(set_to_none=False) does."""
    grads, _ = _core.gradients(list(params))
    present = [g for g in grads if g is not None]
    for g in present:
        if g.grad_fn is not None:
            g.detach_()
        elif g.requires_grad:
            g.requires_grad_(False)
    if present:
        torch._foreach_zero_(present)
