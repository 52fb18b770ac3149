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

    and x <- x - lr d where momentum is 0. One gradient a step. Where it converges, every eigenvalue
    lambda of the Hessian satisfies 0 <= lr (1 - dampening) (lambda + wd) <= 2 (1 + momentum), and
    with Nesterov 0 <= lr (lambda + wd) <= (2 + 2 momentum) / (1 + 2 momentum): see
    `eigenfilter.filters`.

    The whole update is one kernel over all tensors of a device, dtype and group.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, >= 0; a number or a 0-dim tensor.
        momentum: >= 0; convergence needs < 1.
        dampening: of the gradient in the momentum.
        weight_decay: wd, >= 0.
        nesterov: Nesterov's momentum; needs momentum > 0 and dampening 0.
        maximize: ascend f.
        stochastic_rounding: round what is written to bfloat16 and float16 parameters and state up
            or down at random, right on average, so that small updates are not lost.
        skip_nonfinite: leave parameters and state as they were where a gradient is not finite.
        release_gradients: apply and drop each of the descent's gradients while backward runs, so
            that they never exist all at once. Takes step(closure), or the closure inside
            `with opt.evaluation():`, and no GradScaler, clipping, skip_nonfinite or several ranks.
        backend: None, "native", "triton" or "reference": see `eigenfilter.kernels`.
        options: `set_to_none=False` keeps the gradient tensors when an ascent clears them, and
            fills them with 0. Torch's `fused`, `foreach`, `capturable` change nothing;
            `differentiable` and `amsgrad` must be False.

    Raises:
        TypeError: sparse, complex or otherwise unsupported parameters.
        ValueError: a hyperparameter out of its range.

    Example:
        >>> opt = eigenfilter.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss = opt.step(closure)

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
    """SGD's hyperparameters as groups hold them."""
    return {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "stochastic_rounding": stochastic_rounding,
    }
