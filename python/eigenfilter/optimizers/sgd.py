"""Stochastic gradient descent with heavy-ball or Nesterov momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.hyperparameters import Options
from eigenfilter.optimizers.perturbation import Perturbation
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import SGDUpdate


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
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        group |= {"weight_decay": weight_decay}
        super().__init__(params, group, Perturbation(), SGDUpdate(), options)
