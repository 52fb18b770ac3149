"""Sharpness-aware minimization (SAM) and its adaptive form (ASAM)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from eigenfilter.filters import AscentFilter
from eigenfilter.optimizers._amp import AmpState
from eigenfilter.optimizers._ascents import (
    TINY,
    Ascent,
    Landscape,
    Run,
    signed_rho,
    total_norms,
)
from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._buckets import BucketSlice, Gradients, conform_if_needed
from eigenfilter.optimizers._descents import SGDDescent
from eigenfilter.optimizers._options import Options
from eigenfilter.optimizers.sgd import sgd_defaults


class SAMAscent(Ascent):
    """One ascent of length rho along the normalized gradient, scaled by x^2 if adaptive."""

    method = "sam"
    count = 1
    needs_norm = True

    def __init__(self, *, adaptive: bool = False) -> None:
        self.adaptive = adaptive
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
        gradients = conform_if_needed(gradients)
        norms = total_norms(gradients, weights=self.adaptive)
        self._norms = {device: amp.unscale(norm, device) for device, norm in norms.items()}
        return gradients

    def forget(self) -> None:
        self._norms = {}

    def perturb(self, run: Run, index: int, bucket_slice: BucketSlice) -> None:
        bucket = bucket_slice.bucket
        alpha = signed_rho(bucket.group) / (self._norms[bucket.device] + TINY)
        run(bucket.kernels.perturb, bucket_slice, bucket.backups(), alpha, adaptive=self.adaptive)


class SAM(EigenfilterOptimizer):
    r"""Sharpness-aware minimization: SGD's update with the gradient taken at x + rho g / ||g||.

        g = grad f(x);  y = x + rho g / ||g||      (x - rho g / ||g|| with `maximize`)
        ASAM:           y = x + rho x^2 g / ||x g||
        d = grad f(y) + wd x
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    The norm is taken over the gradients of all groups that ascend, on all ranks that hold a shard
    of them. It stays on the device, and 1e-12 is added to it, so that a zero gradient perturbs
    nothing. A step takes two gradients.

    SAM has no filter of its own, because d is not differentiable where grad f = 0. With a constant
    gradient norm G it is USAM with radius rho / G.

    Memory: one backup of the parameters.

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate, at least 0; a number or a 0-dim tensor.
        momentum: decay rate of the momentum buffer, in [0, 1). The step accepts 1 and more, with
            which it does not converge.
        dampening: share of each gradient, in [0, 1], that stays out of the momentum buffer.
        weight_decay: coefficient wd of the L2 penalty at x, at least 0. It enters after the ascent.
        nesterov: whether to use Nesterov's momentum, which needs momentum > 0 and dampening 0.
        rho: length of the ascent, at least 0. It lives in param_groups, as lr does. A group
            with the float 0.0 takes no ascent; if all groups have it, a step costs one gradient.
        adaptive: whether to take ASAM's ascent, which does not depend on the parameters' scales.
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
        >>> opt = eigenfilter.SAM([x], lr=0.1, momentum=0.9, rho=0.5)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(5.)
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
            SAMAscent(adaptive=adaptive),
            SGDDescent(),
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            backend=backend,
            options=options,
        )

    @property
    def adaptive(self) -> bool:
        """Whether the ascent is ASAM's."""
        assert isinstance(self._ascent, SAMAscent)
        return self._ascent.adaptive
