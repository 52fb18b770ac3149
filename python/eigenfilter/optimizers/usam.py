"""Unnormalized sharpness-aware minimization (USAM)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.optimizers._ascents import Ascent, Landscape, Run, signed_rho
from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._buckets import BucketSlice
from eigenfilter.optimizers._descents import SGDDescent
from eigenfilter.optimizers._options import Options
from eigenfilter.optimizers.sgd import sgd_defaults


class USAMAscent(Ascent):
    """One ascent along rho times the gradient."""

    method = "usam"
    count = 1

    def end(self, f: Landscape, x: Tensor, g: Tensor, rho: Tensor, sign: Tensor) -> Tensor:
        return x + sign * rho * g

    def perturb(self, run: Run, index: int, bucket_slice: BucketSlice) -> None:
        bucket = bucket_slice.bucket
        run(bucket.kernels.perturb, bucket_slice, bucket.backups(), signed_rho(bucket.group))


class USAM(EigenfilterOptimizer):
    r"""Unnormalized SAM: SGD's update with the gradient taken at x + rho grad f(x).

        y = x + rho grad f(x)                      (x - rho grad f(x) with `maximize`)
        d = grad f(y) + wd x
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    A step takes two gradients. Where the method converges, every eigenvalue lambda of the Hessian
    satisfies, with q = lambda (1 + rho lambda) + wd, 0 <= lr (1 - dampening) q <= 2 (1 + momentum),
    and with Nesterov 0 <= lr q <= (2 + 2 momentum) / (1 + 2 momentum). This is exact for wd = 0,
    and holds to first order in wd otherwise. A larger rho leaves flatter minima. The filter also
    admits some eigenvalues below -1/rho: see `eigenfilter.filters`.

    One kernel saves and perturbs x, another restores it bit for bit and applies the update.

    Memory: one backup of the parameters.

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate, at least 0; a number or a 0-dim tensor.
        momentum: decay rate of the momentum buffer, in [0, 1). The step accepts 1 and more, with
            which it does not converge.
        dampening: share of each gradient, in [0, 1], that stays out of the momentum buffer.
        weight_decay: coefficient wd of the L2 penalty at x, at least 0. It enters after the ascent.
        nesterov: whether to use Nesterov's momentum, which needs momentum > 0 and dampening 0.
        rho: step size of the ascent, at least 0. It lives in param_groups, as lr does. A group
            with the float 0.0 takes no ascent; if all groups have it, a step costs one gradient.
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
        >>> opt = eigenfilter.USAM([x], lr=0.1, momentum=0.9, rho=0.05)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(5.)
        >>> x.data
        tensor([ 0.7800, -1.5600])

    Source: M. Andriushchenko and N. Flammarion, 2022, arXiv 2206.06232; filter: arXiv 2510.09034.
    """

    method = "usam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        rho: float | Tensor = 0.05,
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
            )
            | {"rho": rho},
            USAMAscent(),
            SGDDescent(),
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            backend=backend,
            options=options,
        )
