"""Stochastic gradient descent with heavy-ball or Nesterov momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.optimizers._ascents import Ascent
from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._descents import SGDDescent
from eigenfilter.optimizers._options import Options


class SGD(EigenfilterOptimizer):
    r"""Gradient descent, heavy ball and Nesterov's method, in torch.optim.SGD's convention.

    With g = grad f(x) (-g with `maximize`):

        d = g + wd x
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    and x <- x - lr d where momentum is 0. A step takes one gradient. Where the method converges,
    every eigenvalue lambda of the Hessian satisfies 0 <= lr (1 - dampening) (lambda + wd) <=
    2 (1 + momentum), and with Nesterov 0 <= lr (lambda + wd) <= (2 + 2 momentum) / (1 + 2
    momentum): see `eigenfilter.filters`.

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
        maximize: whether to maximize f instead of minimizing it.
        stochastic_rounding: whether bfloat16 and float16 parameters and state are rounded up or
            down at random, without bias, so that small updates are not lost on average.
        skip_nonfinite: whether a step with a gradient that is not finite leaves parameters and
            state unchanged. `opt.skipped` counts these steps.
        release_gradients: whether each gradient of the descent is applied and freed while backward
            runs, so that they never exist all at once. It needs step(closure), or the closure
            inside `with opt.evaluation():`, and excludes a GradScaler, clipping, skip_nonfinite
            and several ranks.
        backend: backend of the kernels: "native", "triton", "reference", or None to choose by
            device; see `eigenfilter.kernels`.
        options: `set_to_none=False` keeps the gradient tensors when an ascent clears them, and
            fills them with 0. torch's `fused`, `foreach` and `capturable` are accepted and change
            nothing; `differentiable` and `amsgrad` must be False.

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
        maximize: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        release_gradients: bool = False,
        backend: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            sgd_defaults(
                lr, momentum, dampening, weight_decay, nesterov, maximize, stochastic_rounding
            ),
            Ascent(),
            SGDDescent(),
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            backend=backend,
            options=options,
        )


def sgd_defaults(
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
    stochastic_rounding: bool,
) -> dict[str, Any]:
    """SGD's hyperparameters as the groups hold them."""
    return {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "stochastic_rounding": stochastic_rounding,
    }
