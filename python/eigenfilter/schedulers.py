"""Schedulers of rho, with which some steps take no ascent and cost one gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from eigenfilter import _perturbation
from eigenfilter.optimizers.hyperparameters import (
    base_lr_key,
    bind_rho,
    copy_of_value,
    given_lr,
    initial_rho_key,
    rho_key,
    rho_of,
    unbind_rho,
)

KINDS = ("constant", "linear", "cosine", "step", "late", "every", "lr")

Factor = Callable[[int], float]
"""The factor of rho at a step, counted from 0."""


class RhoScheduler(LRScheduler):
    r"""Sets the rho of the groups before each step, as torch's schedulers set lr.

    At step t of T = `total_steps` a group has rho = initial rho * factor(t), with

        "constant"  1
        "linear"    1 + (end - 1) t / T                          (end from T on)
        "cosine"    end + (1 - end) (1 + cos(pi t / T)) / 2      (end from T on)
        "step"      gamma^floor(t / every)
        "late"      0 until start T, rounded up, then 1
        "every"     1 where t is a multiple of `every`, else 0
        "lr"        lr / initial lr, so that rho = c lr with c = initial rho / initial lr

    or any function of t. A step with factor 0 takes no ascent and costs one gradient.

    With "lr" the optimizer computes rho from the present lr when a step begins, so rho is right
    whatever has changed lr, and in whichever order the schedulers step. Step the scheduler of lr
    first if something reads `group["rho"]` between two steps. As with the other kinds, a rho that
    you set by hand holds until the scheduler steps (if it is a tensor on a device, replace it).

    It is a torch scheduler that leaves lr alone, and may be combined with others in any order. Of
    two that set rho, the last to step decides.

    A scheduler can be copied and pickled, together with its optimizer. A function of your own is
    pickled by its name: define it at the top level of a module, since pickle refuses a lambda.

    Args:
        optimizer: optimizer with lr and rho in its groups (`ascent_rho` if `SharpnessAware` wraps
            one with a `rho` of its own). Their initial rho is `initial_rho`
            (`initial_ascent_rho`), where the groups keep one, and else their present rho, which
            they then keep as that. Their initial lr is torch's `initial_lr`.
        kind: one of the names above, or a function from t >= 0 to a factor >= 0.
        total_steps: number of steps T, at least 1, for "linear", "cosine" and "late".
        end: last factor of "linear" and "cosine", at least 0.
        every: period of "step" and "every", at least 1.
        gamma: factor of "step" at each period, at least 0.
        start: fraction of the training before "late" begins, in [0, 1].
        last_epoch: number of the last step when resuming with an optimizer that has its state
            loaded; -1 to begin.

    Raises:
        TypeError: a group of the optimizer has no rho or no lr.
        KeyError: `last_epoch` is not -1, and a group has no initial rho or lr.
        ValueError: an unknown kind, an argument that is missing or out of its range, or, with
            "lr", an initial lr that is 0, or that a scheduler such as OneCycleLR has replaced.

    Example:
        >>> opt = eigenfilter.USAM([torch.nn.Parameter(torch.ones(2))], lr=0.1, rho=0.05)
        >>> scheduler = RhoScheduler(opt, "late", total_steps=10, start=0.8)
        >>> for step in range(10):
        ...     if step in (0, 7, 8):
        ...         print(step, scheduler.get_last_rho())
        ...     opt.step()  # with a closure
        ...     scheduler.step()
        0 [0.0]
        7 [0.0]
        8 [0.05]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        kind: str | Factor = "constant",
        *,
        total_steps: int | None = None,
        end: float = 0.0,
        every: int | None = None,
        gamma: float = 0.1,
        start: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        name = type(optimizer).__name__
        for index, group in enumerate(getattr(optimizer, "param_groups", ())):
            if rho_key(group) not in group:
                raise TypeError(f"{name} has groups without rho: nothing to set")
            if "lr" not in group:
                raise TypeError(f"{name} has groups without lr, which torch's schedulers need")
            if last_epoch != -1 and initial_rho_key(group) not in group:
                raise KeyError(
                    f"{initial_rho_key(group)!r} is not in param_groups[{index}]: to resume with "
                    "last_epoch, load the optimizer's state first; to begin, leave last_epoch out"
                )
        self._follows_lr = kind == "lr"
        if self._follows_lr and last_epoch == -1 and hasattr(optimizer, "param_groups"):
            _refuse_other_initial_lr(optimizer)
        self._factor = (
            kind if callable(kind) else _factor(kind, total_steps, end, every, gamma, start)
        )
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Advance to the next step; call it after the optimizer's step().

        Args:
            epoch: number of the step to go to; torch deprecates it.

        Raises:
            RuntimeError: the optimizer is between an ascent and its step.
            ValueError: the function of t returns a negative factor, or one that is not finite.
        """
        self._refuse_perturbed()
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The lr of every group as it is, because the scheduler leaves it alone."""
        return [copy_of_value(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float | Tensor]:
        """The present lr of every group, which frameworks log; tensors are copies."""
        return self.get_lr()

    def get_last_rho(self) -> list[float | Tensor]:
        """The present rho of every group; tensors are copies."""
        return [copy_of_value(rho_of(group)) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The number of the step; the constructor's arguments are not in it."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the step to the saved one. Load the optimizer's state first.

        Raises:
            ValueError: the state is not that of a `RhoScheduler`.
            RuntimeError: the optimizer is between an ascent and its step.
        """
        last_epoch = state_dict.get("last_epoch")
        if not isinstance(last_epoch, int) or last_epoch < 0:
            raise ValueError(
                f"the state of a RhoScheduler has a last_epoch of at least 0, and this one has "
                f"{last_epoch!r}: load what its state_dict() returned"
            )
        self._update_lr(last_epoch)
        self._step_count = int(state_dict.get("_step_count", last_epoch + 1))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # A copy of the optimizer lacks torch's count of its steps, which the second count asks for.
        self._step_count = max(self._step_count, 2)

    def _refuse_perturbed(self) -> None:
        # Also where it was given the base of a wrapper, or what a framework wraps around it.
        if _perturbation.holder(p for g in self.optimizer.param_groups for p in g["params"]):
            raise RuntimeError(
                "rho changes between steps, and one is under way: call scheduler.step() after "
                "opt.step()"
            )

    def _update_lr(self, epoch: int | None = None) -> None:
        """Go to a step, or to the next; torch's `step` and `SequentialLR` call it."""
        self._refuse_perturbed()
        t = self.last_epoch + 1 if epoch is None else epoch
        if self._follows_lr:
            self._bind_to_lr()
        else:
            self._multiply(t)
        self.last_epoch = t
        self._last_lr = self.get_lr()

    def _bind_to_lr(self) -> None:
        """Have the optimizer compute rho from lr, also in groups that were added; see `rho_of`."""
        groups = [g for g in self.optimizer.param_groups if base_lr_key(g) not in g]
        bases = [group.get("initial_lr", group["lr"]) for group in groups]
        if any(float(base) == 0 for base in bases):
            raise ValueError(
                'an initial lr of 0 leaves c in rho = c lr undefined: with "lr", construct the '
                "optimizer with the largest lr, and begin lower by a scheduler of lr"
            )
        for group, base in zip(groups, bases, strict=True):
            _initial(group)
            group[base_lr_key(group)] = copy_of_value(base)
        for group in self.optimizer.param_groups:
            bind_rho(group)

    def _multiply(self, t: int) -> None:
        try:
            factor = float(self._factor(t))
        except OverflowError:
            factor = math.inf
        if not 0 <= factor < math.inf:
            raise ValueError(f"a factor must be at least 0 and finite; at {t} it is {factor}")
        for group in self.optimizer.param_groups:
            # Groups that were added later or loaded start with their present rho.
            key, initial = rho_key(group), _initial(group)
            unbind_rho(group)
            if isinstance(group[key], Tensor):
                group[key].copy_(factor * initial)
            else:
                group[key] = factor * float(initial)


def _factor(
    kind: str,
    total_steps: int | None,
    end: float,
    every: int | None,
    gamma: float,
    start: float | None,
) -> Factor:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}, or a function")
    if kind in ("linear", "cosine", "late") and (total_steps is None or total_steps < 1):
        raise ValueError(f'"{kind}" needs total_steps, at least 1')
    if kind in ("step", "every") and (every is None or every < 1):
        raise ValueError(f'"{kind}" needs every, at least 1')
    if kind == "late" and (start is None or not 0 <= start <= 1):
        raise ValueError('"late" needs start, a fraction of the training from 0 to 1')
    if not (0 <= end < math.inf and 0 <= gamma < math.inf):
        raise ValueError("end and gamma must be at least 0 and finite")
    return _Named(kind, total_steps or 1, end, every or 1, gamma, start or 0.0)


@dataclass(frozen=True)
class _Named:
    """The factor of a named kind; an object instead of a function, so that it can be pickled."""

    kind: str
    total_steps: int
    end: float
    every: int
    gamma: float
    start: float

    def __call__(self, t: int) -> float:
        elapsed = min(t / self.total_steps, 1.0)
        match self.kind:
            case "linear":
                return 1.0 + (self.end - 1.0) * elapsed
            case "cosine":
                return self.end + (1.0 - self.end) * (1.0 + math.cos(math.pi * elapsed)) / 2.0
            case "step":
                return float(self.gamma ** (t // self.every))
            case "late":
                return float(t >= math.ceil(self.start * self.total_steps - 1e-9))
            case "every":
                return float(t % self.every == 0)
        return 1.0


def _refuse_other_initial_lr(optimizer: Any) -> None:
    """Raise ValueError where a scheduler's `initial_lr` is not the lr that a group was given."""
    inner = getattr(optimizer, "optimizer", optimizer)  # of a framework's wrapper
    for group in optimizer.param_groups:
        first, initial = given_lr(inner, group), group.get("initial_lr")
        if base_lr_key(group) in group or first is None or initial is None:
            continue
        if float(first) != float(initial):
            raise ValueError(
                f"a scheduler of lr has set initial_lr to {float(initial):g}, and rho belongs to "
                f"the lr of {float(first):g} that the optimizer was given: construct "
                'RhoScheduler(optimizer, "lr") before schedulers such as CyclicLR or OneCycleLR'
            )


def _initial(group: dict[str, Any]) -> float | Tensor:
    """The initial rho of a group, which the group stores; the first call takes its present rho."""
    key = initial_rho_key(group)
    if key not in group:
        group[key] = copy_of_value(group[rho_key(group)])
    initial: float | Tensor = group[key]
    return initial
