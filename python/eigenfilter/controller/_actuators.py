"""What sets the edge of an optimizer's filter, group by group: the extrapolation or rho."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenfilter import filters
from eigenfilter.certificate.linearized import perturbation_of, radius_of
from eigenfilter.filters import HeavyBall, Nesterov, PolynomialFilter, design
from eigenfilter.optimizers import MSAM, SGD, AdamW
from eigenfilter.optimizers.hyperparameters import initial_rho_key, rho_key
from eigenfilter.optimizers.updates import EXTRAPOLATION

_SLACK = 0.005  # e and rho stay as they are where a change of lr has moved the edge by less
_LEAST_LR = 0.25  # rho's default limit is right for this share of the largest lr without ascents
_ADAMW = "adamw"

Group = dict[str, Any]


@dataclass
class Actuator:
    """What sets the edge of a group: its extrapolation e or rho.

    Attributes:
        key: its name in the group.
        method: the method that `filters.design` knows.
        options: further arguments of `filters.design`.
        limit: the largest value.
        value: the value that was set last.
        is_limited: whether that is the limit.
        scalars: the hyperparameters for which it was set, lr first; None before.
    """

    key: str
    method: str
    options: Mapping[str, Any]
    limit: float
    value: float
    is_limited: bool = False
    scalars: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, index: int, target: float, limit: float | None
    ) -> Actuator:
        """Return the actuator of a group.

        Raises:
            TypeError, ValueError: it has none; see `SharpnessController`.
        """
        group = optimizer.param_groups[index]
        method = _method_of(optimizer, group)
        _refuse_uncontrolled(group, index)
        if method in _EXTRAPOLATED:
            _check_extrapolation(group, index, method, target)
            largest = math.inf if limit is None else limit
            return cls(EXTRAPOLATION, method, {}, largest, group[EXTRAPOLATION])
        options = perturbation_of(optimizer).filter_options | {"nesterov": group["nesterov"]}
        if limit is None:
            same = _hyperparameters(group) | options
            del same["lr"]
            lr = design(method, target, rho=0.0, **same)
            limit = design(method, target, lr=_LEAST_LR * lr, **same)
        key = rho_key(group)
        return cls(key, method, options, limit, float(group[key]))

    def refuse_change(self, group: Group) -> None:
        """Raise RuntimeError if other code has changed the value; tensors are not read."""
        value = group[self.key]
        if self.scalars is not None and not isinstance(value, Tensor) and value != self.value:
            raise RuntimeError(
                f"{self.key} of a group is {value}, and the SharpnessController has set "
                f"{self.value}: let nothing else set it, and restore the states of the optimizer "
                "and of the controller together"
            )

    def set_edge(self, group: Group, edge: float, *, is_new: bool) -> None:
        """Put the edge of a group's filter at `edge`, or as near as the value's range permits."""
        arguments = _hyperparameters(group)
        now = tuple(arguments.values())
        if now[0] == 0.0 or not (is_new or self.scalars is None or self._is_stale(now)):
            return  # with lr = 0 nothing changes, and the next lr decides
        value = 0.0
        if edge < edge_at_zero(group):
            value = float(design(self.method, edge, **arguments, **self.options))
        self.is_limited = value >= self.limit
        self.value, self.scalars = min(value, self.limit), now
        if isinstance(group[self.key], Tensor):
            group[self.key].fill_(self.value)
        else:
            group[self.key] = self.value

    def state(self) -> tuple[float, bool, tuple[float, ...] | None]:
        """Return what later calls depend on."""
        return self.value, self.is_limited, self.scalars

    def load_state(self, state: tuple[float, bool, tuple[float, ...] | None]) -> None:
        """Restore what `state` returned."""
        self.value, self.is_limited, scalars = state
        self.scalars = None if scalars is None else tuple(scalars)

    def _is_stale(self, now: tuple[float, ...]) -> bool:
        assert self.scalars is not None
        (lr, *rest), (old_lr, *old_rest) = now, self.scalars
        reach = old_lr + 2.0 * self.value if self.method in _EXTRAPOLATED else old_lr  # in the edge
        return rest != old_rest or abs(lr - old_lr) > _SLACK * reach


_EXTRAPOLATED = ("sgd", _ADAMW)  # methods of `design` that are controlled by e


def edge_at_zero(group: Group) -> float:
    """The edge of a group with e or rho = 0; -inf if weight decay alone exceeds it."""
    values = _hyperparameters(group)
    if "betas" in group:
        return filters.AdamW(**values).max_eigenvalue()
    return (Nesterov if group["nesterov"] else HeavyBall)(**values).max_eigenvalue()


def _hyperparameters(group: Group) -> dict[str, Any]:
    """The arguments that the group's filter shares with `filters.design`, lr first."""
    if "betas" in group:
        values = {name: float(group[name]) for name in ("lr", "weight_decay")}
        return values | {"beta1": float(group["betas"][0])}
    return {name: float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")}


def _refuse_uncontrolled(group: Group, index: int) -> None:
    """Raise ValueError for a group that maximizes, or whose rho has a scheduler."""
    if group.get("maximize"):
        raise ValueError(
            f"param_groups[{index}] maximizes, and the sharpness would be that of -f: minimize "
            "the negated loss instead"
        )
    if initial_rho_key(group) in group:
        raise ValueError(
            f"a RhoScheduler sets rho in param_groups[{index}], and so would the controller: "
            "use one of the two"
        )


def _check_extrapolation(group: Group, index: int, method: str, target: float) -> None:
    """Raise TypeError or ValueError unless an extrapolation may be set in the group."""
    if method == _ADAMW:
        if any(p.dtype == torch.float16 for p in group["params"]):
            raise TypeError(
                f"param_groups[{index}] has float16 parameters, for which AdamW takes no "
                "extrapolation: use bfloat16 or float32 parameters"
            )
        return
    values = _hyperparameters(group)
    if not values["momentum"] > 0 or group["nesterov"]:
        raise ValueError(
            f"param_groups[{index}] has no extrapolation to control, which follows the "
            "buffer of heavy ball: set momentum > 0, and no nesterov"
        )
    design(method, target, **values | {"lr": None})  # refuses a dampening of 1


def refuse_ascent(optimizer: AdamW, group: Group) -> None:
    """Raise ValueError for a group that ascends, whose edge is of another matrix."""
    if radius_of(optimizer, group) != 0.0:
        raise ValueError(
            "AdamW ascends, and the controller sets its extrapolation, for which the gradient is "
            "taken without an ascent: set rho=0, or leave method out"
        )


def _method_of(optimizer: torch.optim.Optimizer, group: Group) -> str:
    """Return the method by which `filters.design` finds e or rho.

    Raises:
        TypeError: the edge cannot be set.
        ValueError: an AdamW ascends.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, AdamW):
        refuse_ascent(optimizer, group)
        return _ADAMW
    if perturbation_of(optimizer).method == "sam":
        raise TypeError(
            f"{name}'s edge moves with the gradient's norm, so that no rho keeps it: use USAM, "
            "TwoStepUSAM or HessianUSAM"
        )
    if isinstance(optimizer, MSAM):
        raise TypeError(
            f"{name}'s edge moves with the momentum's norm, so that no rho keeps it: use SGD with "
            "momentum, whose extrapolation the controller sets"
        )
    members = filters.of(optimizer)  # raises TypeError where no filter is known
    if isinstance(optimizer, SGD):
        return "sgd"
    method = perturbation_of(optimizer).method
    if method not in filters.ASCENTS or not isinstance(members[0], PolynomialFilter):
        raise TypeError(
            f"{name} has no e or rho by which the edge is set: use SGD with momentum, AdamW, "
            "USAM, TwoStepUSAM, HessianUSAM, or SharpnessAware with such an ascent around "
            "torch.optim.SGD"
        )
    return method
