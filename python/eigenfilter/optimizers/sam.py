"""Sharpness-aware minimization (SAM) and its adaptive form (ASAM)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from eigenfilter.filters import AscentFilter
from eigenfilter.optimizers._norms import total_norms
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.buckets import BucketSlice, Gradients
from eigenfilter.optimizers.hyperparameters import Options
from eigenfilter.optimizers.perturbation import TINY, Landscape, Perturbation
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import SGDUpdate


class SAMPerturbation(Perturbation):
    """One ascent of length rho along the normalized gradient, scaled by x^2 if adaptive."""

    method = "sam"
    count = 1
    needs_norm = True

    def __init__(self, *, adaptive: bool = False) -> None:
        self.adaptive = adaptive
        self.accesses = 6 if adaptive else 5  # USAM's; its norm reads g, and ASAM's x too
        self._norms: dict[torch.device, Tensor | float] = {}

    @property
    def title(self) -> str:
        return "ASAM" if self.adaptive else super().title

    @property
    def theory(self) -> type[AscentFilter] | None:
        return None if self.adaptive else super().theory

    def end(self, f: Landscape, x: Tensor, g: Tensor, rho: Tensor, sign: Tensor) -> Tensor:
        weights = x if self.adaptive else torch.ones_like(x)
        norm = f.norm(weights * g * (rho != 0))
        return x + sign * rho * weights.square() * g / norm if norm else x

    def prepare(
        self, index: int, gradients: Gradients, padded: Gradients, amp: AmpState
    ) -> Gradients:
        norms = total_norms(gradients, weights=self.adaptive)
        self._norms = {device: amp.unscale(norm, device) for device, norm in norms.items()}
        return gradients

    def forget(self) -> None:
        self._norms = {}

    def perturb(self, index: int, bucket_slice: BucketSlice) -> None:
        bucket = bucket_slice.bucket
        alpha = bucket.signed_rho / (self._norms[bucket.device] + TINY)
        bucket_slice.launch(bucket.kernels.perturb, bucket.backups(), alpha, adaptive=self.adaptive)


@register("sam", SAMPerturbation, asam={"adaptive": True})
class SAM(EigenfilterOptimizer):
    r"""Sharpness-aware minimization: SGD's update with the gradient taken at x + rho g / ||g||.

        g = grad f(x);  y = x + rho g / ||g||      (x - rho g / ||g|| with `maximize`)
        ASAM:           y = x + rho x^2 g / ||x g||
        d = grad f(y) + wd x                       (then as in `SGD`)

    The norm is taken over the gradients of all groups that ascend, on all ranks that hold a shard
    of them. It stays on the device, and 1e-12 is added to it, so that a zero gradient perturbs
    nothing. A step takes two gradients. SAM has no filter of its own, because d is not
    differentiable where grad f = 0; with a constant gradient norm G it is USAM of radius rho / G.

    Memory: one backup of the parameters. The errors are those of `SGD`.

    Args:
        params, lr, momentum, dampening, nesterov: those of `SGD`.
        weight_decay: coefficient wd of the L2 penalty at x, at least 0. It enters after the ascent.
        rho: length of the ascent, at least 0, in param_groups; the float 0.0 takes none.
        adaptive: whether to take ASAM's ascent, which does not depend on the parameters' scales.
        options: the keyword arguments of `Options`.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = eigenfilter.SAM([x], lr=0.1, momentum=0.9, rho=0.5)
        >>> x.square().sum().backward()
        >>> while opt.ascend():
        ...     x.square().sum().backward()
        >>> opt.step()
        >>> x.data
        tensor([ 0.7553, -1.5106])

    Source: P. Foret et al., 2021, arXiv 2010.01412; ASAM: J. Kwon et al., 2021, arXiv 2102.11600,
    with eta = 0.
    """

    method = "sam"

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
        adaptive: bool = False,
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        group |= {"weight_decay": weight_decay, "rho": rho}
        super().__init__(params, group, SAMPerturbation(adaptive=adaptive), SGDUpdate(), options)

    @property
    def adaptive(self) -> bool:
        """Whether the ascent is ASAM's."""
        assert isinstance(self.perturbation, SAMPerturbation)
        return self.perturbation.adaptive
