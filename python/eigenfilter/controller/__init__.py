"""Sharpness control: the edge of an optimizer's filter is kept where the sharpness is wanted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eigenfilter import filters
from eigenfilter.certificate.linearized import Linearized, has_preconditioner, preconditioner
from eigenfilter.controller._actuators import Actuator, Group, edge_at_zero, refuse_ascent
from eigenfilter.curvature import CurvatureOperator
from eigenfilter.curvature.operators.preconditioned import PreconditionedOperator
from eigenfilter.monitor import SharpnessCheck, SharpnessMonitor, Writer
from eigenfilter.optimizers import AdamW
from eigenfilter.optimizers.extrapolation import at_x

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAND = 0.1
"""Relative distance from the target within which the sharpness counts as being there."""
RECENT = 8
"""Checks too high in a row, until control has ended."""

_STEP = math.log(1.25)  # largest correction of a check
_LOWEST = -math.log(1.5)  # least correction: the edge is designed no further below the target
_PULL = 1.2  # the edge is put no further than by this factor below the sharpness
_FAR = 1.5  # how far above the target a sharpness is checked more often, on its way down
_HURRY = 4  # how much more often that is
_RISE = 0.01  # a sharpness that rises faster, from check to check, needs no higher edge
_RISEN = 4  # checks that a rise is compared with


class SharpnessController(SharpnessMonitor):
    r"""Keeps the sharpness of a model at a target during training.

    It sets the extrapolation e (`SGD` with momentum, `AdamW`) or rho (methods with ascents) of
    every group, and leaves lr to its schedule. The edge of each group's filter is put at

        edge = max(target exp(c), sharpness / 1.2)

    after every change of lr, momentum, dampening or weight decay, by `filters.design`. The
    correction c is 0 at first. Every check measures the sharpness s, from the last eigenvector on,
    and adds gain log(target / s) to c, at most log 1.25. So c learns by how much the sharpness
    stays off the edge, which is by a factor in minibatch training. c stays where it is while the
    sharpness rises by itself, and where e or rho is at a limit. docs/control.md measures it.

    No optimizer pushes the sharpness up. Below the target e or rho goes down to 0, and the
    sharpness is then that of training without control.

    The sharpness is the largest eigenvalue of the Hessian H at x, which `SGD` evaluates and saves,
    for groups that differ, too. For `AdamW` it is that of P^-1/2 H P^-1/2, with the preconditioner
    P = sqrt(v / (1 - beta2^t)) + eps that it has at the check.

    Args:
        op: the Hessian of the loss in the optimizer's parameters, as for `SharpnessMonitor`.
        optimizer: `SGD` with momentum > 0 and no nesterov; `AdamW` with rho = 0 and no float16
            parameters; `USAM`, `TwoStepUSAM`, `HessianUSAM`, or `SharpnessAware` with such an
            ascent around torch's SGD.
        max_eigenvalue: the target, greater than 0, for `AdamW` of the preconditioned Hessian.
        every: number of training steps from one check to the next, >= 1. The first check is at the
            first step. While the sharpness is above 1.5 times the target, checks are four times as
            frequent.
        max_every: longest interval, >= every, by default 4 every. The interval doubles with every
            check within 5% of the target, and is `every` again after one beyond 10%.
        tol: relative tolerance of the two largest eigenvalues, > 0. A check follows two, so that it
            notices when the second becomes the largest.
        gain: share of an error that a check corrects, in (0, 1].
        limit: largest e or rho that is set, > 0. The default for e is none, since e has to stay
            below (1 + momentum) / edge, for `AdamW` (1 + beta1) / ((1 - beta1) edge); for rho it is
            3 / target with USAM, and in general the rho with which lr may be a quarter of that
            which needs no ascent.
        log, writer, callback, seed: as for `SharpnessMonitor`.

    Attributes:
        history: list of all checks.
        edge: the edge that is wanted now; before the first step the target.
        target: the target.
        saturated: "sharp" if eight checks in a row were more than 10% above the target and no
            control is left; "flat" if e or rho is 0 in every group; else None.

    Raises:
        TypeError: the optimizer has nothing to control the edge by.
        ValueError: an argument is out of its range, the operator and the optimizer have different
            parameters, a `RhoScheduler` sets rho, an `AdamW` ascends, or a group maximizes.

    Example:
        >>> import eigenfilter as ef, torch
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> opt = ef.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> op = ef.curvature.HessianOperator(model, loss_fn, (x, y))
        >>> controller = ef.SharpnessController(op, opt, max_eigenvalue=9.0, every=1)
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     opt.step()
        ...     _ = controller.step()
        >>> [(check.step, round(check.sharpness, 3)) for check in controller.history]
        [(1, 9.0), (3, 9.0)]
        >>> round(opt.param_groups[0]["extrapolation"], 4)  # (lr + 2 e) 9 = 2 (1 + momentum)
        0.2061

    Source: the edges are those of arXiv 2510.09034; the control is ours.
    """

    _followed = 2

    def __init__(
        self,
        op: CurvatureOperator,
        optimizer: torch.optim.Optimizer,
        max_eigenvalue: float,
        every: int = 100,
        *,
        max_every: int | None = None,
        tol: float = 5e-2,
        gain: float = 0.5,
        limit: float | None = None,
        log: str | Path | None = None,
        writer: Writer | None = None,
        callback: Callable[[SharpnessCheck], object] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < max_eigenvalue < math.inf:
            raise ValueError(f"max_eigenvalue must be positive and finite, not {max_eigenvalue}")
        if not 0 < gain <= 1:
            raise ValueError(f"gain must be above 0 and at most 1, not {gain}")
        if limit is not None and not limit > 0:
            raise ValueError(f"limit must be positive, not {limit}")
        if max_every is not None and max_every < every:
            raise ValueError(f"max_every must be at least every = {every}, not {max_every}")
        super().__init__(
            op, optimizer, every, tol=tol, log=log, writer=writer, callback=callback, seed=seed
        )
        self.target = self.edge = float(max_eigenvalue)
        self.saturated: str | None = None
        self._gain = gain
        self._correction, self._recent = 0.0, list[float]()
        self._max_every = 4 * every if max_every is None else max_every
        self._interval, self._next = every, 1
        self._checks = self._checked = 0  # how many there were, and the step of the last one
        self._has_warned = False
        self._actuators = [
            Actuator.of(optimizer, index, self.target, limit)
            for index in range(len(optimizer.param_groups))
        ]

    def step(self) -> SharpnessCheck | None:
        """Count a training step; follow lr, and check after the first and every `every`-th one.

        Call it after the optimizer's step and that of the schedulers, so that the next step has the
        edge that is wanted at its lr.

        Raises:
            RuntimeError: other code has changed e or rho since the last call; see also `check`.
        """
        self._refuse_changes()
        self._steps += 1
        if self._steps >= self._next and self._can_measure():
            return self.check()
        self._set_edges()
        return None

    def check(self) -> SharpnessCheck:
        """Measure the sharpness now, log it, correct the edge, and set e or rho by it.

        Raises:
            RuntimeError: the optimizer holds perturbed parameters, other code has changed e or rho,
                or AdamW has taken no step.
            ValueError: the optimizer has other parameters than the operator by now, or an AdamW
                ascends by now.
        """
        self._refuse_changes()
        if not self._can_measure():
            raise RuntimeError(
                "AdamW has taken no step, and has no preconditioner by which the sharpness is "
                "measured: check after its first step, or load its state before"
            )
        with at_x(self._optimizer):
            check = super().check()
        self._checks, self._checked = self._checks + 1, self._steps
        self._correct(check.sharpness)
        self._set_edges(is_new=True)
        self._judge(check)
        self._plan(check)
        return check

    def state_dict(self) -> dict[str, Any]:
        """Return what later checks depend on, to continue bit for bit; without the history.

        The groups' e and rho are in the optimizer's state: save and load both.
        """
        own = {name: getattr(self, name) for name in _STATE}
        states = [actuator.state() for actuator in self._actuators]
        return super().state_dict() | own | {"actuators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned. Load the optimizer's, too.

        Raises:
            ValueError: the state is not a controller's, or belongs to another model, or to another
                number of groups. Nothing has changed.
        """
        missing = [name for name in (*_STATE, "actuators") if name not in state_dict]
        if missing:
            raise ValueError(
                f"the state lacks {', '.join(missing)}: it is no state of a SharpnessController, "
                "or one of another version; start the control again without it"
            )
        states = state_dict["actuators"]
        if len(states) != len(self._actuators):
            raise ValueError(
                f"the state is of {len(states)} groups, and the optimizer has "
                f"{len(self._actuators)}"
            )
        super().load_state_dict(state_dict)
        for name in _STATE:
            setattr(self, name, state_dict[name])
        for actuator, state in zip(self._actuators, states, strict=True):
            actuator.load_state(state)

    def plot(self, ax: Axes | None = None) -> Any:
        """Draw sharpness, edge and the target's band over the steps; return the axes."""
        ax = super().plot(ax)
        low, high = (self.target * (1 + sign * BAND) for sign in (-1, 1))
        ax.axhspan(low, high, alpha=0.15, label="target, 10%")
        ax.legend(frameon=False)
        return ax

    def _linearized(self) -> Linearized | None:
        """Return H or AdamW's P^-1/2 H P^-1/2, and the filter of the group with the lowest edge."""
        lowest = min(filters.of(self._optimizer), key=lambda flt: flt.max_eigenvalue())
        if not isinstance(self._optimizer, AdamW):
            return Linearized(self._op, "the Hessian H", lowest)
        for group in self._optimizer.param_groups:
            refuse_ascent(self._optimizer, group)
        scale = preconditioner(self._optimizer, self._op.params).to(self._op.dtype)
        operator = PreconditionedOperator(self._op, scale)
        return Linearized(operator, "P^-1/2 H P^-1/2, P of AdamW now", lowest, scale)

    def _can_measure(self) -> bool:
        """Whether the matrix is known, as AdamW's is from its first step on."""
        optimizer = self._optimizer
        return not isinstance(optimizer, AdamW) or has_preconditioner(optimizer, self._op.params)

    def _correct(self, sharpness: float) -> None:
        """Add a share of the error to the correction, unless that could not help."""
        ratio = math.log(max(sharpness / self.target, 1e-12))
        rises = ratio > max(self._recent[-_RISEN:], default=ratio) + _RISE
        change = max(-_STEP, min(-self._gain * ratio, _STEP))
        is_held = rises if change > 0 else self._is_pulled() or self._is_at_limit()
        if self._recent and not is_held:  # the first check shows what was before any control
            highest = max(edge_at_zero(group) for group in self._optimizer.param_groups)
            highest = math.log(highest / self.target) if highest > self.target else 0.0
            self._correction = max(_LOWEST, min(self._correction + change, highest))
        self._recent = [*self._recent, ratio][-RECENT:]
        self.edge = max(self.target * math.exp(self._correction), sharpness / _PULL)

    def _is_pulled(self) -> bool:
        """Whether the edge is above the designed one, on its way down from a higher sharpness."""
        return self.edge > (1 + 1e-9) * self.target * math.exp(self._correction)

    def _set_edges(self, *, is_new: bool = False) -> None:
        for actuator, group in self._actuators_and_groups():
            actuator.set_edge(group, self.edge, is_new=is_new)

    def _refuse_changes(self) -> None:
        for actuator, group in self._actuators_and_groups():
            actuator.refuse_change(group)

    def _is_at_limit(self) -> bool:
        return all(actuator.is_limited for actuator in self._actuators)

    def _judge(self, check: SharpnessCheck) -> None:
        """State whether control has ended, and warn once where the sharpness is too high."""
        recent = self._recent
        is_sharp = len(recent) == RECENT and min(recent) > math.log(1 + BAND)
        is_falling = recent[-1] < recent[0] - _RISE
        is_lowest = self._correction <= _LOWEST or self._is_pulled() or self._is_at_limit()
        if is_sharp and is_lowest and not is_falling:
            self.saturated = "sharp"
        elif all(actuator.value == 0.0 for actuator in self._actuators):
            self.saturated = "flat"
        else:
            self.saturated = None
        if self.saturated == "sharp" and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"step {check.step}: the sharpness {check.sharpness:.4g} is above the target "
                f"{self.target:.4g}, and the edge is as low as it may be put: raise max_eigenvalue"
                " or limit, or keep lr from decaying as far",
                stacklevel=4,
            )

    def _plan(self, check: SharpnessCheck) -> None:
        """Decide when the next check is."""
        error = abs(check.sharpness / self.target - 1.0)
        if error > BAND:
            self._interval = self._every
        elif error <= BAND / 2:
            self._interval = min(2 * self._interval, self._max_every)
        hurry = _HURRY if check.sharpness > _FAR * self.target else 1
        self._next = self._steps + max(1, self._interval // hurry)

    def _actuators_and_groups(self) -> Iterator[tuple[Actuator, Group]]:
        groups = self._optimizer.param_groups
        if len(groups) != len(self._actuators):
            raise RuntimeError(
                f"the optimizer has {len(groups)} groups, and had {len(self._actuators)} when the "
                "SharpnessController was constructed: construct a new one after add_param_group"
            )
        return zip(self._actuators, groups, strict=True)


_STATE = (
    *("_correction", "_recent", "_interval", "_next", "_checks", "_checked"),
    *("edge", "saturated", "_has_warned"),
)
