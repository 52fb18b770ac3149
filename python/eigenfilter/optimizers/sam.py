"""Sharpness-aware minimisation, normalised, and its adaptive form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from eigenfilter.optimizers._ascents import TINY, Ascent, Run, signed, total_norms
from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._descents import SGDDescent
from eigenfilter.optimizers._guard import Guard
from eigenfilter.optimizers._options import Options
from eigenfilter.optimizers._parts import Gradients, Piece, conforming
from eigenfilter.optimizers.sgd import sgd_defaults


class SAMAscent(Ascent):
    """One ascent of length rho along the normalised gradient; adaptive: scaled by x^2."""

    method = "sam"
    count = 1
    takes_norm = True

    def __init__(self, *, adaptive: bool = False) -> None:
        self.adaptive = adaptive
        self._norms: dict[torch.device, Tensor | float] = {}

    def prepare(self, index: int, found: Gradients, whole: Gradients, guard: Guard) -> Gradients:
        found = conforming(found)
        norms = total_norms(found, weights=self.adaptive)
        self._norms = {device: guard.unscaled(norm, device) for device, norm in norms.items()}
        return found

    def forget(self) -> None:
        self._norms = {}

    def move(self, run: Run, index: int, piece: Piece) -> None:
        part = piece.part
        alpha = signed(part.group) / (self._norms[part.device] + TINY)
        run(part.kernels.ascend, piece, part.backups(), alpha, adaptive=self.adaptive)


class SAM(EigenfilterOptimizer):
    r"""Sharpness-aware minimisation: SGD's update with the gradient taken at x + rho g / ||g||.

        g = grad f(x);  y = x + rho g / ||g||      (x - rho g / ||g|| with `maximize`)
        ASAM:           y = x + rho x^2 g / ||x g||
        d = grad f(y) + wd x
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    The norm is that of the whole gradient of all groups that ascend, over all ranks that hold a
    shard of it; 1e-12 is added to it, so that a gradient of 0 moves nothing. It stays on the
    device. Two gradients a step.

    d is not differentiable where grad f = 0: SAM has no filter of its own. With the gradient's norm
    G held fixed it is USAM with radius rho / G.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, >= 0; a number or a 0-dim tensor.
        momentum: >= 0; convergence needs < 1.
        dampening: of the gradient in the momentum.
        weight_decay: wd, >= 0; enters after the ascent.
        nesterov: Nesterov's momentum; needs momentum > 0 and dampening 0.
        rho: length of the ascent, >= 0. Groups with the float 0.0 take none.
        adaptive: ASAM, whose ascent does not depend on the parameters' scales.
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
        >>> opt = eigenfilter.SAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.05)
        >>> loss = opt.step(closure)

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
        """Whether it is ASAM."""
        assert isinstance(self._ascent, SAMAscent)
        return self._ascent.adaptive
