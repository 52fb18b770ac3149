"""Unnormalized SAM (USAM) with two ascents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.filters import TwoStepUSAM as TwoStep
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.buckets import BucketSlice
from eigenfilter.optimizers.hyperparameters import Options
from eigenfilter.optimizers.perturbation import Landscape, Perturbation
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import SGDUpdate


class TwoStepUSAMPerturbation(Perturbation):
    """Two ascents: the second starts at the first one's end ("sequential") or at x ("anchored")."""

    method = "two_step_usam"
    count = 2
    is_elementwise = True
    accesses = 7  # USAM's; then reads x, g, and writes x

    def __init__(self, *, ascent: str = "sequential") -> None:
        if ascent not in TwoStep.forms:
            raise ValueError(f'ascent must be "sequential" or "anchored", and is {ascent!r}')
        self.ascent = ascent

    @property
    def filter_options(self) -> dict[str, Any]:
        return {"ascent": self.ascent}

    def end(self, f: Landscape, x: Tensor, g: Tensor, rho: Tensor, sign: Tensor) -> Tensor:
        y = x + sign * rho * g
        return (x if self.ascent == "anchored" else y) + sign * rho * f.gradient(y)

    def starts_from_x(self, index: int) -> bool:
        return self.ascent == "anchored"

    def perturb(self, index: int, bucket_slice: BucketSlice) -> None:
        bucket = bucket_slice.bucket
        alpha = bucket.signed_rho
        if not bucket_slice.is_perturbed:
            bucket_slice.launch(bucket.kernels.perturb, bucket.backups(), alpha)
        else:
            origin = bucket.backups() if self.ascent == "anchored" else None
            bucket_slice.launch(bucket.kernels.perturb, origin, alpha, save=False)


@register("two_step_usam", TwoStepUSAMPerturbation)
class TwoStepUSAM(EigenfilterOptimizer):
    r"""Two-step USAM: SGD's update with the gradient taken after two ascents.

        y = x + rho grad f(x)
        z = y + rho grad f(y)                      ("sequential"; "anchored": x + rho grad f(y))
        d = grad f(z) + wd x                       (then as in `SGD`)

    A step takes three gradients. With `maximize`, -rho takes the place of rho in both ascents. In
    the filter, p(lambda) = lambda (1 + rho lambda)^2 ("sequential") or lambda (1 + rho lambda +
    rho^2 lambda^2) ("anchored") takes the place of lambda. At wd = 0 it admits no negative
    eigenvalue, except exactly -1 / rho in the sequential form: see `eigenfilter.filters`.

    Memory: one backup of the parameters. The errors are those of `SGD`.

    Args:
        params, lr, momentum, dampening, nesterov: those of `SGD`.
        weight_decay: coefficient wd of the L2 penalty at x, at least 0. It enters after the last
            ascent.
        rho: step size of both ascents, at least 0, in param_groups; the float 0.0 takes none.
        ascent: where the second ascent starts: at y ("sequential") or at x ("anchored").
        options: the keyword arguments of `Options`.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = eigenfilter.TwoStepUSAM([x], lr=0.1, momentum=0.9, rho=0.05)
        >>> x.square().sum().backward()
        >>> while opt.ascend():
        ...     x.square().sum().backward()
        >>> opt.step()
        >>> x.data
        tensor([ 0.7580, -1.5160])

    Source: arXiv 2510.09034; its exact form is our reading.
    """

    method = "two_step_usam"

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
        ascent: str = "sequential",
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        group |= {"weight_decay": weight_decay, "rho": rho}
        perturbation = TwoStepUSAMPerturbation(ascent=ascent)
        super().__init__(params, group, perturbation, SGDUpdate(), options)

    @property
    def ascent(self) -> str:
        """Where the second ascent starts: "sequential" or "anchored"."""
        assert isinstance(self.perturbation, TwoStepUSAMPerturbation)
        return self.perturbation.ascent
