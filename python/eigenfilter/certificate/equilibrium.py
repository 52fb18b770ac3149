"""The direction in which an optimizer moves at a point, which is zero at an equilibrium."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenfilter.certificate.linearized import perturbation_of, preconditioner, radius_of, spread
from eigenfilter.curvature.norms import norms
from eigenfilter.curvature.operators.hessian import HessianOperator


@dataclass(frozen=True, eq=False)
class Direction:
    """The direction of an optimizer at x, from the gradients of all data.

    Attributes:
        vector: [n], s d(x) + wd x, with s = -1 if f is maximized. For AdamW, whose weight decay is
            not divided by P, it is s d(x) + wd P x. It is zero at an equilibrium.
        gradient_norm: norm of grad f(x).
        ascent_norm: norm of the part of grad f(x) whose parameters take an ascent.
    """

    vector: Tensor
    gradient_norm: float
    ascent_norm: float


@dataclass(frozen=True)
class _Landscape:
    """The function of an operator, see `optimizers.perturbation.Landscape`."""

    op: HessianOperator

    def gradient(self, x: Tensor) -> Tensor:
        return self.op.gradient(x)

    def matvec(self, v: Tensor) -> Tensor:
        return self.op.matvec(v)

    def norm(self, v: Tensor) -> float:
        return float(norms(v.double()))


@torch.no_grad()
def direction(op: HessianOperator, optimizer: torch.optim.Optimizer) -> Direction:
    """Return the direction of an optimizer at the parameters of `op`, which do not change.

    d(x) is defined in the docstring of each optimizer; grad f is over all data of `op`.

    Raises:
        FloatingPointError: the direction is not finite.
    """
    groups = optimizer.param_groups
    rho = spread(op, [(g, radius_of(optimizer, g)) for g in groups])
    sign = spread(op, [(g, -1.0 if g.get("maximize") else 1.0) for g in groups])
    decay = spread(op, [(g, float(g["weight_decay"])) for g in groups])
    x = torch.cat([p.detach().reshape(-1) for p in op.params])
    if all("betas" in g for g in groups):
        decay = decay / preconditioner(optimizer, op.params).to(op.dtype).square()
    g = op.gradient()
    ascending = g * (rho != 0)
    d = g
    if bool(rho.any()):
        d = op.gradient(perturbation_of(optimizer).end(_Landscape(op), x, g, rho, sign))
    vector = sign * d + decay * x
    if not vector.isfinite().all():
        raise FloatingPointError("the gradient is not finite: is the loss, at these parameters?")
    return Direction(vector, *(float(norms(t.double())) for t in (g, ascending)))
