"""Stochastic gradient descent with heavy-ball, Nesterov or extrapolated momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.filters import design
from eigenfilter.optimizers.extrapolation import ExtrapolatedOptimizer
from eigenfilter.optimizers.hyperparameters import Options, is_zero
from eigenfilter.optimizers.perturbation import Perturbation
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import EXTRAPOLATION, SGDUpdate

_FOLLOWS = (
    "extrapolation follows the momentum buffer of heavy ball: set momentum > 0, and no nesterov"
)


@register("sgd")
class SGD(ExtrapolatedOptimizer):
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
        group: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        group |= {"nesterov": nesterov, "weight_decay": weight_decay}
        group |= self._extrapolation_options(extrapolation, max_eigenvalue)
        super().__init__(params, group, Perturbation(), SGDUpdate(), options)

    def _extrapolation_for(self, group: dict[str, Any], max_eigenvalue: float) -> float:
        if is_zero(group["momentum"]) or group["nesterov"]:
            raise ValueError(f"max_eigenvalue sets an extrapolation, and an {_FOLLOWS}")
        names = ("lr", "momentum", "dampening", "weight_decay")
        values: dict[str, Any] = {name: float(group[name]) for name in names}
        return float(design("sgd", max_eigenvalue, **values))

    def _check_extrapolation(self, group: dict[str, Any]) -> None:
        super()._check_extrapolation(group)
        if group[EXTRAPOLATION] != 0 and (is_zero(group["momentum"]) or group["nesterov"]):
            raise ValueError(_FOLLOWS)
