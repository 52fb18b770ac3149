"""Unnormalised SAM with two ascents."""

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


class TwoStepUSAMAscent(Ascent):
    """Two ascents, the second from where the first led ("sequential") or from x ("anchored")."""

    method = "two_step_usam"
    count = 2

    def __init__(self, *, ascent: str = "sequential") -> None:
        if ascent not in ("sequential", "anchored"):
            raise ValueError(f'ascent must be "sequential" or "anchored", and is {ascent!r}')
        self.ascent = ascent

    def from_x(self, index: int) -> bool:
        return self.ascent == "anchored"

    def move(self, run: Run, index: int, piece: Piece) -> None:
        part = piece.part
        alpha = signed(part.group)
        if not piece.moved:
            run(part.kernels.ascend, piece, part.backups(), alpha)
        else:
            origin = part.backups() if self.ascent == "anchored" else None
            run(part.kernels.ascend_again, piece, alpha, origin)


class TwoStepUSAM(EigenfilterOptimizer):
    r"""Two-step USAM: SGD's update with the gradient taken after two ascents.

        y = x + rho grad f(x)
        z = y + rho grad f(y)                      ("sequential"; "anchored": x + rho grad f(y))
        d = grad f(z) + wd x
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    Three gradients a step; the signs of both rho turn with `maximize`. Where it converges, every
    eigenvalue lambda of the Hessian satisfies, with q = p(lambda) + wd, 0 <= lr (1 - dampening) q
    <= 2 (1 + momentum), and with Nesterov 0 <= lr q <= (2 + 2 momentum) / (1 + 2 momentum) (exactly
    for wd = 0, else but for a term of order wd), where p = lambda (1 + rho lambda)^2
    ("sequential") or lambda (1 + rho lambda + rho^2 lambda^2) ("anchored"). At wd = 0 no negative
    eigenvalue passes but, sequentially, exactly -1 / rho.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, >= 0; a number or a 0-dim tensor.
        momentum: >= 0; convergence needs < 1.
        dampening: of the gradient in the momentum.
        weight_decay: wd, >= 0; enters after the ascents.
        nesterov: Nesterov's momentum; needs momentum > 0 and dampening 0.
        rho: step of both ascents, >= 0. Groups with the float 0.0 take none.
        ascent: "sequential" or "anchored".
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
        >>> opt = eigenfilter.TwoStepUSAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.02)
        >>> loss = opt.step(closure)

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
            TwoStepUSAMAscent(ascent=ascent),
            SGDDescent(),
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            backend=backend,
            options=options,
        )

    @property
    def ascent(self) -> str:
        """Where the second ascent starts: "sequential" or "anchored"."""
        assert isinstance(self._ascent, TwoStepUSAMAscent)
        return self._ascent.ascent
