"""Stochastic gradient descent with heavy-ball, Nesterov or extrapolated momentum."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from eigenfilter.filters import design
from eigenfilter.optimizers._step_state import retry_on_layout_change, through_owner
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.hyperparameters import Options, is_zero
from eigenfilter.optimizers.perturbation import Perturbation
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import EXTRAPOLATED, EXTRAPOLATION, SGDUpdate

_MAX_EIGENVALUE = "max_eigenvalue"  # in a group until it is checked
_BOTH = "extrapolation and max_eigenvalue set the same: give one of them"
_FOLLOWS = (
    "extrapolation follows the momentum buffer of heavy ball: set momentum > 0, and no nesterov"
)


@register("sgd")
class SGD(EigenfilterOptimizer):
    r"""Gradient descent, heavy ball and Nesterov's method, in torch.optim.SGD's convention.

    With g = grad f(x) (-g with `maximize`):

        d = g + wd x
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    and x <- x - lr d where momentum is 0. A step takes one gradient. Where the method converges,
    every eigenvalue lambda of the Hessian satisfies 0 <= lr (1 - dampening) (lambda + wd) <=
    2 (1 + momentum), and with Nesterov 0 <= lr (lambda + wd) <= (2 + 2 momentum) / (1 + 2
    momentum). For a method that ascends, p(lambda) stands for lambda, which is exact for wd = 0,
    and holds to first order in wd otherwise: see `eigenfilter.filters`.

    With an extrapolation e the gradient and the decay are taken at y = x - e m. Between steps the
    parameters hold y, so that a step costs what heavy ball's costs: one gradient, no closure, no
    further memory. For e >= 0 then 0 <= (lr + 2 e) (1 - dampening) (lambda + wd) <= 2 (1 +
    momentum), which puts the edge anywhere below heavy ball's; e = lr momentum has Nesterov's. For
    e < 0 see `eigenfilter.filters.HeavyBall`. Evaluate and save x: call `eval()` before, and
    `train()` to go on.

    One kernel call updates all tensors of a group that share a device and a dtype. Memory: one
    buffer like the parameters if momentum > 0.

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate, at least 0; a number or a 0-dim tensor.
        momentum: decay rate of the momentum buffer, in [0, 1). The step accepts 1 and more, with
            which it does not converge.
        dampening: share of each gradient, in [0, 1], that stays out of the momentum buffer.
        weight_decay: coefficient wd of the L2 penalty, at least 0.
        nesterov: whether to use Nesterov's momentum, which needs momentum > 0 and dampening 0.
        extrapolation: how far e along -m the gradient is taken; a number, by default 0. It needs
            momentum > 0 and no nesterov. It lives in param_groups, and a change of it takes effect
            with the next gradient.
        max_eigenvalue: the edge that is wanted, in place of `extrapolation`: each group gets the e
            that puts its edge there at its present lr.
        options: the keyword arguments of `Options`.

    Raises:
        TypeError: a parameter is sparse, complex or of an unsupported dtype.
        ValueError: a hyperparameter is out of its range.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = eigenfilter.SGD([x], lr=0.1, momentum=0.9)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(5.)
        >>> x.data
        tensor([ 0.8000, -1.6000])

    Source: B. Polyak, 1964; Y. Nesterov, 1983; the filters: arXiv 2510.09034.
    """

    method = "sgd"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        extrapolation: float | None = None,
        max_eigenvalue: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        if None not in (extrapolation, max_eigenvalue):
            raise ValueError(_BOTH)
        group: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        group["nesterov"] = nesterov
        group |= {"weight_decay": weight_decay, EXTRAPOLATION: extrapolation or 0.0}
        group |= {EXTRAPOLATED: None, _MAX_EIGENVALUE: max_eigenvalue}
        super().__init__(params, group, Perturbation(), SGDUpdate(), options)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        if (
            EXTRAPOLATION in param_group
            and param_group.setdefault(_MAX_EIGENVALUE, None) is not None
        ):
            raise ValueError(_BOTH)
        super()._add_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        max_eigenvalue = group.pop(_MAX_EIGENVALUE, None)
        if max_eigenvalue is not None:
            super()._check_group(group)
            if is_zero(group["momentum"]) or group["nesterov"]:
                raise ValueError(f"max_eigenvalue sets an extrapolation, and an {_FOLLOWS}")
            names = ("lr", "momentum", "dampening", "weight_decay")
            values: dict[str, Any] = {name: float(group[name]) for name in names}
            group[EXTRAPOLATION] = float(design("sgd", max_eigenvalue, **values))
        super()._check_group(group)
        if group[EXTRAPOLATED] is None:  # without momentum buffers x and y are the same
            group[EXTRAPOLATED] = self._wanted(group)

    def _wanted(self, group: dict[str, Any]) -> float:
        """The extrapolation that the parameters of a group should have in training."""
        extrapolation: float = group[EXTRAPOLATION]
        return extrapolation

    def _check_extrapolation(self, group: dict[str, Any]) -> None:
        extrapolation = group[EXTRAPOLATION]
        if isinstance(extrapolation, bool) or not isinstance(extrapolation, numbers.Real):
            raise TypeError(f"extrapolation must be a number, and is {extrapolation!r}")
        if not math.isfinite(extrapolation):
            raise ValueError(f"extrapolation must be finite, and is {extrapolation}")
        if extrapolation != 0 and (is_zero(group["momentum"]) or group["nesterov"]):
            raise ValueError(_FOLLOWS)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.SGD, whose parameters hold x.

        Raises:
            RuntimeError: the parameters are perturbed.
            ValueError: the groups do not match.
        """
        groups = [{EXTRAPOLATED: 0.0} | group for group in state_dict.get("param_groups", ())]
        super().load_state_dict(state_dict | {"param_groups": groups})

    @through_owner
    def eval(self) -> None:
        """Put x = y + e m into the parameters, to evaluate or to save them.

        The sum is rounded to the parameters' dtype, and so is y when `train()` goes back to it. A
        step without `train()` takes its gradient at x, and leaves y. Without extrapolation x is
        there already.

        Raises:
            RuntimeError: it is called by the closure that `step` is evaluating.
        """
        self._extrapolate(False)

    @through_owner
    def train(self) -> None:
        """Put y = x - e m into the parameters, to train on.

        Raises:
            RuntimeError: it is called by the closure that `step` is evaluating.
        """
        self._extrapolate(True)

    @retry_on_layout_change
    @torch.no_grad()
    def _extrapolate(self, is_training: bool) -> None:
        wanted = [(g, self._wanted(g) if is_training else 0.0) for g in self.current_groups()]
        if all(group[EXTRAPOLATED] == e for group, e in wanted):
            return
        self._step_state.refuse_within_closure("train()" if is_training else "eval()")
        self._buckets.refresh(self)
        cast(SGDUpdate, self._update).extrapolate(self._buckets, wanted)
