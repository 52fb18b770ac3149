"""What an optimizer does near an equilibrium: a symmetric matrix, and a filter of its eigenvalues.

The certificate and the monitor ask this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eigenfilter import filters
from eigenfilter.curvature.operators import CurvatureOperator
from eigenfilter.curvature.preconditioned import PreconditionedOperator
from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.filters import SAM, AdamW, Filter, HeavyBall, Nesterov, PolynomialFilter
from eigenfilter.optimizers._ascents import Ascent

Group = Mapping[str, Any]


class NoFilter(Exception):
    """Why the filters of an optimizer's groups do not compose."""


@dataclass(frozen=True)
class Linearised:
    """A symmetric matrix that tells what an optimizer does near x, and which eigenvalues it admits.

    Attributes:
        operator: the matrix.
        matrix: in words.
        filter: of its eigenvalues; of an optimizer that minimises.
        scale: the diagonal D [n] of the coordinates D^-1 x in which the matrix is symmetric, or
            None for the identity.
        products: products of the Hessian in one of the matrix.
        notes: what the filter rests on.
    """

    operator: SymmetricOperator
    matrix: str
    filter: Filter
    scale: Tensor | None = None
    products: int = 1
    notes: tuple[str, ...] = ()


def linearised(
    op: CurvatureOperator, optimizer: torch.optim.Optimizer, *, grad_norm: float | None = None
) -> Linearised:
    """Return what `optimizer` does near the point of `op`, the Hessian in its parameters.

    Groups that are alike keep the Hessian and their filter. Groups of SGD, USAM and SAM that share
    momentum and direction compose to A^1/2 (H + H R H + W) A^1/2, for diagonal learning rates A,
    radii R and decays W: it evolves as the Hessian does under SGD with lr 1. AdamW is seen through
    its preconditioner. With `maximize` the matrix is that of -f.

    Raises:
        NoFilter: the groups do not compose.
        ValueError: AdamW has taken no step; see also `filters.of`.
        TypeError: see `filters.of`.
    """
    held = {id(p) for p in op.params}
    every = zip(optimizer.param_groups, filters.of(optimizer, grad_norm=grad_norm), strict=True)
    groups = [(g, f) for g, f in every if any(id(p) in held for p in g["params"])]
    polynomials = [(g, f) for g, f in groups if isinstance(f, PolynomialFilter)]
    if not polynomials:
        return _adamw(op, optimizer, groups, grad_norm)
    one = polynomials[0][1]
    if any(f != one for _, f in polynomials):
        return _composed(op, polynomials)
    if not one.maximize:
        return Linearised(op, "the Hessian H", one, notes=_notes([one]))
    ones = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)
    operator = PreconditionedOperator(op, ones, sign=-1.0)
    flt = replace(one, maximize=False)
    return Linearised(operator, "-H, of what is maximised", flt, notes=_notes([one]))


def adamw_operator(
    op: CurvatureOperator, optimizer: torch.optim.Optimizer, grad_norm: float | None = None
) -> PreconditionedOperator:
    """P^-1/2 (s H + H R H) P^-1/2 of an optimizer with AdamW's groups.

    Raises:
        NoFilter: its ascent is not USAM's, nor SAM's at a gradient norm.
    """
    groups = optimizer.param_groups
    rho: float | Tensor = 0.0
    if any(float(g.get("rho", 0.0)) != 0.0 for g in groups):
        method = ascent_of(optimizer).method
        if method not in ("usam", "sam") or (method == "sam" and not grad_norm):
            raise NoFilter(f"AdamW's filter after an ascent of {method} is not known")
        if getattr(ascent_of(optimizer), "adaptive", False):
            raise NoFilter("AdamW's filter after an ascent of ASAM is not known")
        length = grad_norm if method == "sam" and grad_norm else 1.0
        rho = spread(op, [(g, float(g["rho"]) / length) for g in groups])
    scale = preconditioner(optimizer, op.params).to(op.dtype)
    sign = -1.0 if groups[0].get("maximize") else 1.0
    return PreconditionedOperator(op, scale, rho, sign=sign)


def preconditioner(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Tensor:
    """P^-1/2 [n] of AdamW for the parameters in this order; ones before the first step."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for p in params:
        state = optimizer.state.get(p, {})
        group = group_of.get(id(p))
        if group is None or "exp_avg_sq" not in state:
            parts.append(torch.ones(p.numel(), device=p.device))
            continue
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        parts.append((corrected.sqrt() + group["eps"]).rsqrt().reshape(-1))
    return torch.cat(parts)


def spread(op: CurvatureOperator, values: Iterable[tuple[Group, float]]) -> Tensor:
    """The number of each group as a vector [n] over the operator's parameters, in its dtype.

    0 for parameters in no group.
    """
    value_of = {id(p): value for group, value in values for p in group["params"]}
    parts = [p.new_full((p.numel(),), value_of.get(id(p), 0.0)).detach() for p in op.params]
    return torch.cat(parts)


def ascent_of(optimizer: torch.optim.Optimizer) -> Ascent:
    """How an optimizer ascends before its gradient; torch's own do not."""
    ascent: Ascent = getattr(optimizer, "_ascent", None) or Ascent()
    return ascent


def _adamw(
    op: CurvatureOperator,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[tuple[Group, Filter]],
    grad_norm: float | None,
) -> Linearised:
    one = groups[0][1]
    assert isinstance(one, AdamW)
    if any(f != one for _, f in groups):
        raise NoFilter(
            "AdamW's groups differ in lr, beta1, weight decay or maximize, and such filters are "
            "not composed"
        )
    if not any("exp_avg_sq" in optimizer.state.get(p, {}) for g, _ in groups for p in g["params"]):
        raise ValueError("AdamW has no preconditioner before its first step: load its state")
    operator = adamw_operator(op, optimizer, grad_norm)
    inner = "H" if operator.products == 1 else "(H + H R H)"
    return Linearised(
        operator,
        f"P^-1/2 {inner} P^-1/2, P of AdamW now",
        replace(one, maximize=False),
        preconditioner(optimizer, op.params).to(op.dtype),
        operator.products,
        _notes([one]),
    )


def _composed(
    op: CurvatureOperator, groups: Sequence[tuple[Group, PolynomialFilter]]
) -> Linearised:
    found = [f for _, f in groups]
    first = found[0]
    if any(len(f.coefficients) > 3 for f in found):
        raise NoFilter("the groups differ, and only filters of SGD, USAM and SAM are composed")
    for name in ("momentum", "nesterov", "maximize"):
        if any(getattr(f, name) != getattr(first, name) for f in found):
            raise NoFilter(f"the groups differ in {name}, so that their filters do not compose")
    momentum = first.momentum
    rates = [f.lr * (1 - f.dampening if momentum > 0 else 1.0) for f in found]
    radii = [dict(enumerate(f.ascending_coefficients)).get(2, 0.0) for f in found]
    decays = [f.weight_decay for f in found]
    rate, rho, decay = (
        spread(op, [(g, x) for (g, _), x in zip(groups, values, strict=True)])
        for values in (rates, radii, decays)
    )
    scale = rate.sqrt()
    operator = PreconditionedOperator(op, scale, rho, decay, sign=-1.0 if first.maximize else 1.0)
    one = Nesterov(1.0, momentum) if first.nesterov else HeavyBall(1.0, momentum)
    matrix = "A^1/2 (H + H R H + W) A^1/2 of the groups' lr, rho and decay"
    return Linearised(operator, matrix, one, scale, operator.products, _notes(found))


def _notes(found: Sequence[Filter]) -> tuple[str, ...]:
    notes = []
    for norm in {f.grad_norm for f in found if isinstance(f, SAM)}:
        notes.append(f"the gradient's norm held at {norm:.3g}: SAM's edge moves with it")
    if isinstance(found[0], AdamW):
        notes.append("AdamW's preconditioner held as it is")
    decays = any(getattr(f, "weight_decay", 0.0) > 0 for f in found)
    if decays and not all(isinstance(f, HeavyBall) for f in found):
        notes.append("but for a term of first order in weight decay")
    return tuple(notes)
