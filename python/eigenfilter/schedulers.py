"""Schedules of rho, with which some steps take no ascent and cost one gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenfilter.optimizers.hyperparameters import rho_key

KINDS = ("constant", "linear", "cosine", "step", "late", "every")

Factor = Callable[[int], float]
"""The factor of rho at a step, counted from 0."""


class RhoSchedule:
    r"""Sets the rho of the groups before each step, as torch's schedulers set lr.

    At step t of T = `total_steps` a group has rho = initial rho * factor(t), with

        "constant"  1
        "linear"    1 + (end - 1) t / T                          (end from T on)
        "cosine"    end + (1 - end) (1 + cos(pi t / T)) / 2      (end from T on)
        "step"      gamma^floor(t / every)
        "late"      0 until start T, then 1
        "every"     1 where t is a multiple of `every`, else 0

    or any function of t. A step with factor 0 takes no ascent and costs one gradient. The schedule
    leaves lr alone and may be combined with torch's schedulers in any order.

    A schedule can be copied and pickled, together with its optimizer. A function of your own is
    pickled by its name: define it at the top level of a module, since pickle refuses a lambda.

    Args:
        optimizer: optimizer with rho in its groups (`ascent_rho` if `SharpnessAware` wraps one
            with a `rho` of its own). Their present rho is the initial one, which the groups keep as
            `initial_rho` (`initial_ascent_rho`).
        kind: one of the names above, or a function from t >= 0 to a factor >= 0.
        total_steps: number of steps T, at least 1, for "linear", "cosine" and "late".
        end: last factor of "linear" and "cosine", at least 0.
        every: period of "step" and "every", at least 1.
        gamma: factor of "step" at each period, at least 0.
        start: fraction of the training before "late" begins, in [0, 1].

    Raises:
        TypeError: a group of the optimizer has no rho.
        ValueError: an unknown kind, or an argument that is missing or out of its range.

    Example:
        >>> opt = eigenfilter.USAM([torch.nn.Parameter(torch.ones(2))], lr=0.1, rho=0.05)
        >>> schedule = RhoSchedule(opt, "late", total_steps=10, start=0.8)
        >>> for step in range(10):  # each after opt.step(closure)
        ...     schedule.step()
        ...     if step in (0, 6, 7):
        ...         print(step, opt.param_groups[0]["rho"])
        0 0.0
        6 0.0
        7 0.05
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
    ) -> None:
        if not all(rho_key(group) in group for group in optimizer.param_groups):
            raise TypeError(f"{type(optimizer).__name__} has groups without rho: nothing to set")
        self.optimizer = optimizer
        self._factor = (
            kind if callable(kind) else _factor(kind, total_steps, end, every, gamma, start)
        )
        self._step = 0
        for group in optimizer.param_groups:
            _initial(group)
        self._set()

    def step(self) -> None:
        """Advance to the next step; call it after the optimizer's step().

        Raises:
            RuntimeError: the optimizer is between an ascent and its step.
        """
        if getattr(self.optimizer, "perturbed", False):
            raise RuntimeError(
                "rho changes between steps, and one is under way: call schedule.step() after "
                "opt.step()"
            )
        self._step += 1
        self._set()

    def get_last_rho(self) -> list[float | Tensor]:
        """The present rho of every group."""
        return [group[rho_key(group)] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The number of the step; the constructor's arguments are not in it."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the step to the saved one. Load the optimizer's state first."""
        self._step = int(state_dict["step"])
        self._set()

    def _set(self) -> None:
        try:
            factor = float(self._factor(self._step))
        except OverflowError:
            factor = math.inf
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"a factor must be at least 0 and finite; at {self._step} it is {factor}"
            )
        for group in self.optimizer.param_groups:
            # Groups that were added later or loaded start with their present rho.
            key, initial = rho_key(group), _initial(group)
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
                return float(t >= self.start * self.total_steps)
            case "every":
                return float(t % self.every == 0)
        return 1.0


def _initial(group: dict[str, Any]) -> float | Tensor:
    """The initial rho of a group, which the group stores; the first call takes its present rho."""
    key = rho_key(group)
    rho = group[key]
    initial: float | Tensor = group.setdefault(
        f"initial_{key}", rho.clone() if isinstance(rho, Tensor) else rho
    )
    return initial
