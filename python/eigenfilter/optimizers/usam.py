"""Unnormalized sharpness-aware minimization (USAM)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.buckets import BucketSlice
from eigenfilter.optimizers.hyperparameters import Options
from eigenfilter.optimizers.perturbation import Landscape, Perturbation
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import SGDUpdate


class USAMPerturbation(Perturbation):
    """One ascent along rho times the gradient."""

    method = "usam"
    count = 1
    is_elementwise = True
    accesses = 4  # reads x, g; writes x and its backup

    def end(self, f: Landscape, x: Tensor, g: Tensor, rho: Tensor, sign: Tensor) -> Tensor:
        return x + sign * rho * g

    def perturb(self, index: int, bucket_slice: BucketSlice) -> None:
        bucket = bucket_slice.bucket
        bucket_slice.launch(bucket.kernels.perturb, bucket.backups(), bucket.signed_rho)


@register("usam", USAMPerturbation)
class USAM(EigenfilterOptimizer):
    r"""Unnormalized SAM: SGD's update with the gradient taken at x + rho grad f(x).

        y = x + rho grad f(x)                      (x - rho grad f(x) with `maximize`)
        d = grad f(y) + wd x                       (then as in `SGD`)

    A step takes two gradients. In the filter, p(lambda) = lambda (1 + rho lambda) takes the place
    of lambda, so that a larger rho leaves flatter minima. It also admits some eigenvalues below
    -1 / rho: see `eigenfilter.filters.USAM`.

    Memory: one backup of the parameters. The errors are those of `SGD`.

    Args:
        params, lr, momentum, dampening, nesterov: those of `SGD`.
        weight_decay: coefficient wd of the L2 penalty at x, at least 0. It enters after the ascent.
        rho: step size of the ascent, at least 0, in param_groups; the float 0.0 takes none.
        options: the keyword arguments of `Options`.

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
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        group |= {"weight_decay": weight_decay, "rho": rho}
        super().__init__(params, group, USAMPerturbation(), SGDUpdate(), options)
