"""Checks that an evaluation does not add its gradients to earlier ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

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
    """Detects gradients that the last descent has used, or that a closure adds its own to.

    A program that clears its gradients clears all of them, so checking the first and the last
    suffices for used ones. Marks are attributes of the gradients and keep no memory alive.
    """

    def __init__(self) -> None:
        self._probes: list[Tensor] = []
        self._check: _ClosureCheck | None = None  # of the closure that is running

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
        grads, missing = _core.gradients(params)
        if missing == len(grads) or not any_nonzero([g for g in grads if g is not None]):
            yield
            return
        check = self._check = _ClosureCheck([p for p in params if p.grad is not None])
        try:
            yield
        except BaseException:
            check.end()
            raise
        finally:
            self._check = None
        mixed, kept = check.end()
        if kept and not mixed and not check.mixed:
            raise RuntimeError(NOT_COMPUTED)
        if mixed or kept:
            raise RuntimeError(NOT_CLEARED)

    def are_unchanged(self) -> bool:
        """Whether used gradients have been neither cleared nor written since."""
        grads = self._grads()
        return bool(grads) and all(_is_marked(g, _USED_VERSION) for g in grads)

    def refuse(self) -> None:
        """Raise RuntimeError if an ascent would use a gradient a second time."""
        if any(_is_marked(g, _USED_VERSION) for g in self._grads()):
            raise RuntimeError(ALREADY_USED)

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._probes if p.grad is not None]


class _ClosureCheck:
    """Detects that a closure did not clear the gradients that existed before it.

    Hooks check each parameter's gradient just before backward first adds to it, and record the
    result just after. They cost time, and are used only if there are gradients that no step used.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        # By id: whether a pending addition meets an older gradient, and whether the first one did.
        self._meets: dict[int, bool] = {}
        self.mixed: dict[int, bool] = {}
        self._hooks: list[Any] = []
        for p in params:
            setattr(p.grad, _PRIOR_VERSION, _version(cast(Tensor, p.grad)))
            if p.requires_grad:
                before = functools.partial(self._before_accumulation, p)
                self._hooks.append(p.register_hook(before))  # type: ignore[no-untyped-call]
                self._hooks.append(p.register_post_accumulate_grad_hook(self._after_accumulation))  # type: ignore[no-untyped-call]

    def _before_accumulation(self, p: Tensor, _: Tensor) -> None:
        if id(p) not in self.mixed:  # torch.autograd.grad gets here too, and adds nothing
            g = p.grad
            self._meets[id(p)] = _is_older(g)

    def _after_accumulation(self, p: Tensor) -> None:
        if id(p) not in self._meets:  # FSDP2 calls this hook alone
            self._meets[id(p)] = _is_older(p.grad)
        self.mixed.setdefault(id(p), self._meets[id(p)])

    def forget(self) -> None:
        """Record that all gradients have just been cleared in place."""
        self._meets.clear()
        self.mixed.clear()
        for _, g in self._prior():
            delattr(g, _PRIOR_VERSION)

    def end(self) -> tuple[bool, bool]:
        """End the check.

        Where no hook is called (gradients written by hand), a gradient that was changed in place
        counts as mixed.

        Returns:
            Whether new gradients were added to older ones, and whether older ones stayed unchanged.
        """
        for hook in self._hooks:
            hook.remove()
        rest = [g for p, g in self._prior() if id(p) not in self.mixed]
        same = [g for g in rest if _is_marked(g, _PRIOR_VERSION)]
        changed = [g for g in rest if not _is_marked(g, _PRIOR_VERSION)]
        for _, g in self._prior():
            delattr(g, _PRIOR_VERSION)
        return any(self.mixed.values()) or any_nonzero(changed), any_nonzero(same)

    def _prior(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that still have their older gradients, and these."""
        pairs = [(p, p.grad) for p in self._params if p.grad is not None]
        return [(p, g) for p, g in pairs if hasattr(g, _PRIOR_VERSION)]


def _is_older(g: Tensor | None) -> bool:
    """Whether a gradient existed before the closure, and is not 0."""
    return g is not None and hasattr(g, _PRIOR_VERSION) and any_nonzero([g])


def _is_marked(g: Tensor, name: str) -> bool:
    """Whether the version of a gradient is the one with which it was marked."""
    version: int | None = getattr(g, name, None)
    return version is not None and version == _version(g)


def _version(g: Tensor) -> int:
    """The version of a gradient's local shard, to which FSDP2 adds; 0 for inference tensors."""
    local = _distributed.local(g)
    return 0 if local.is_inference() else local._version


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
