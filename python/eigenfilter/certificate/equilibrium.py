"""The direction in which an optimizer moves at a point, which is zero at an equilibrium."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenfilter.certificate.linearized import ascent_of, preconditioner, spread
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


@torch.no_grad()
def direction(op: HessianOperator, optimizer: torch.optim.Optimizer) -> Direction:
    """Return the direction of an optimizer at the parameters of `op`, which do not change.

    d(x) is defined in the docstring of each optimizer; grad f is over all data of `op`.

    Raises:
        FloatingPointError: the direction is not finite.
    """
    groups = optimizer.param_groups
    rho = spread(op, [(g, float(g.get("rho", 0.0))) for g in groups])
    sign = spread(op, [(g, -1.0 if g.get("maximize") else 1.0) for g in groups])
    decay = spread(op, [(g, float(g["weight_decay"])) for g in groups])
    x = torch.cat([p.detach().reshape(-1) for p in op.params])
    if all("betas" in g for g in groups):
        decay = decay / preconditioner(optimizer, op.params).to(op.dtype).square()
    g = op.gradient()
    ascending = g * (rho != 0)
    d = _descent_gradient(op, optimizer, x, g, rho, sign) if bool(rho.any()) else g
    vector = sign * d + decay * x
    if not vector.isfinite().all():
        raise FloatingPointError("the gradient is not finite: is the loss, at these parameters?")
    return Direction(vector, *(float(norms(t.double())) for t in (g, ascending)))


def _descent_gradient(
    op: HessianOperator,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    g: Tensor,
    rho: Tensor,
    sign: Tensor,
) -> Tensor:
    """Return d(x), the gradient at the point to which the ascents lead."""
    ascent = ascent_of(optimizer)
    up = sign * rho
    match ascent.method:
        case "usam":
            return op.gradient(x + up * g)
        case "sam":
            weights = x if getattr(ascent, "adaptive", False) else torch.ones_like(x)
            norm = float(norms((weights * g * (rho != 0)).double()))
            return op.gradient(x + up * weights.square() * g / norm) if norm else g
        case "two_step_usam":
            y = x + up * g
            origin = x if getattr(ascent, "ascent", "") == "anchored" else y
            return op.gradient(origin + up * op.gradient(y))
        case "hessian_usam":
            ascending = (rho != 0).to(g.dtype)
            return op.gradient(x + rho * (ascending * op.matvec(ascending * g)))
    raise TypeError(f"no direction is known for an ascent of {ascent.method}")
