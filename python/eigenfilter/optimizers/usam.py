"""Unnormalised sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.optimizers._ascents import Ascent, Run, signed
from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._descents import SGDDescent
from eigenfilter.optimizers._options import Options
from eigenfilter.optimizers._parts import Piece
from eigenfilter.optimizers.sgd import sgd_defaults


class USAMAscent(Ascent):
    """One ascent along rho times the gradient."""

    method = "usam"
    count = 1

    def move(self, run: Run, index: int, piece: Piece) -> None:
        part = piece.part
        run(part.kernels.ascend, piece, part.backups(), signed(part.group))


class USAM(EigenfilterOptimizer):
    r"""Unnormalised SAM: SGD's update with the gradient taken at x + rho grad f(x).

        y = x + rho grad f(x)                      (x - rho grad f(x) with `maximize`)
        d = grad f(y) + wd x
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    Two gradients a step. Where it converges, every eigenvalue lambda of the Hessian satisfies, with
    q = lambda (1 + rho lambda) + wd, 0 <= lr (1 - dampening) q <= 2 (1 + momentum), and with
    Nesterov 0 <= lr q <= (2 + 2 momentum) / (1 + 2 momentum) (exactly for wd = 0, else but for
    a term of order wd): the larger rho, the flatter the minima. Eigenvalues below -1/rho can
    pass too. See `eigenfilter.filters`.

    The ascent is one kernel, which saves x and moves it; the descent is one, which restores x bit
    for bit and applies the update. Parameters keep their storage. Memory: one backup of the
    parameters.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, >= 0; a number or a 0-dim tensor.
        momentum: >= 0; convergence needs < 1.
        dampening: of the gradient in the momentum.
        weight_decay: wd, >= 0; enters after the ascent.
        nesterov: Nesterov's momentum; needs momentum > 0 and dampening 0.
        rho: the ascent's step, >= 0; it lives in param_groups as lr does. Groups with the float 0.0
            take no ascent, and where all have it a step costs one gradient.
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
        >>> opt = eigenfilter.USAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.05)
        >>> loss = opt.step(closure)

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
