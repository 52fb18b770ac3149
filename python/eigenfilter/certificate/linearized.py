"""The linearization of an optimizer at an equilibrium: a symmetric matrix, and its filter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _distributed, filters
from eigenfilter.curvature.operators.base import CurvatureOperator
from eigenfilter.curvature.operators.preconditioned import PreconditionedOperator
from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.filters import MSAM, SAM, AdamW, Filter, HeavyBall, PolynomialFilter
from eigenfilter.kernels.compression import read
from eigenfilter.optimizers.perturbation import Perturbation

Group = Mapping[str, Any]


class NoFilter(Exception):
    """There is no filter for the optimizer; the message says why."""


class NoPreconditioner(ValueError):
    """AdamW has taken no step, and has no preconditioner yet."""


@dataclass(frozen=True)
class Linearized:
    """A symmetric matrix whose eigenvalues decide an optimizer's stability near x, and its filter.

    Attributes:
        operator: the matrix.
        matrix: the matrix in words.
        filter: the filter of its eigenvalues, of an optimizer that minimizes.
        scale: diagonal D [n] of the coordinates D^-1 x in which the matrix is symmetric, or None
            for the identity.
        lower: the matrix to which the lower end of the filter applies, if it is another one.
        products: number of products with the Hessian in one product with the matrix.
        notes: assumptions of the filter.
    """

    operator: SymmetricOperator
    matrix: str
    filter: Filter
    scale: Tensor | None = None
    lower: SymmetricOperator | None = None
    products: int = 1
    notes: tuple[str, ...] = ()


def linearized(
    op: CurvatureOperator, optimizer: torch.optim.Optimizer, *, grad_norm: float | None = None
) -> Linearized:
    """Linearize an optimizer near the point of `op`, the Hessian in the optimizer's parameters.

    If all groups have the same hyperparameters, their filter applies to the Hessian, or for AdamW
    to P^-1/2 J P^-1/2 with the Jacobian J of its gradient. Otherwise the filters are composed. With
    `maximize` the matrix is that of -f.

    Args:
        op: the Hessian.
        optimizer: the optimizer.
        grad_norm: the norm of the gradient at which SAM's filter is taken.

    Raises:
        NoFilter: the filters of the groups do not compose.
        NoPreconditioner: AdamW has taken no step.
        ValueError, TypeError: see `filters.of` and `check_parameters`.
    """
    check_parameters(op, optimizer)
    own = {id(p) for p in op.params}
    every = zip(optimizer.param_groups, filters.of(optimizer, grad_norm=grad_norm), strict=True)
    groups = [(g, f) for g, f in every if any(id(p) in own for p in g["params"])]
    first = groups[0][1]
    alike = all(f == first for _, f in groups)
    if isinstance(first, AdamW) and not has_preconditioner(optimizer, op.params):
        raise NoPreconditioner("AdamW has no preconditioner before its first step: load its state")
    if not alike:
        return _compose(op, optimizer, groups, grad_norm)
    sign = -1.0 if groups[0][0].get("maximize") else 1.0
    flt: Filter = replace(first, maximize=False)  # type: ignore[type-var]
    notes = _notes([first])
    if isinstance(first, AdamW):
        scale = preconditioner(optimizer, op.params).to(op.dtype)
        rho, ascent = _ascents(op, optimizer, [g for g, _ in groups], grad_norm)
        operator = PreconditionedOperator(op, scale, rho, sign=sign, ascent=ascent)
        matrix = f"P^-1/2 {_jacobian(operator, ascent)} P^-1/2, P of AdamW now"
        products = operator.products
        return Linearized(operator, matrix, flt, scale, products=products, notes=notes)
    if sign > 0:
        return Linearized(op, "the Hessian H", flt, notes=notes)
    operator = PreconditionedOperator(op, spread(op, [(g, 1.0) for g, _ in groups]), sign=sign)
    return Linearized(operator, "-H, since f is maximized", flt, notes=notes)


def check_parameters(op: CurvatureOperator, optimizer: torch.optim.Optimizer) -> None:
    """Check that an operator and an optimizer have the same parameters, in any order.

    Parameters that do not require grad belong to neither.

    Raises:
        ValueError: they differ, so that the filter would belong to another matrix.
    """
    names = {id(p): name for module in op.modules for name, p in module.named_parameters()}
    optimized: dict[int, str] = {}
    for i, group in enumerate(optimizer.param_groups):
        param_names = group.get("param_names")
        for j, p in enumerate(group["params"]):
            if p.requires_grad:
                name = param_names[j] if param_names else f"number {j} of group {i}"
                optimized[id(p)] = names.get(id(p), name)
    own = {id(p): names.get(id(p), f"number {i}") for i, p in enumerate(op.params)}
    missing = [name for key, name in own.items() if key not in optimized]
    extra = [name for key, name in optimized.items() if key not in own]
    if missing or extra:
        raise ValueError(
            "the operator and the optimizer must be of the same parameters: "
            + "; ".join(
                f"{len(params)} of the {owner} {'is' if len(params) == 1 else 'are'} not the "
                f"{other}'s ({_enumeration(params)})"
                for params, owner, other in (
                    (missing, "operator", "optimizer"),
                    (extra, "optimizer", "operator"),
                )
                if params
            )
            + ". Make the operator with params= the optimizer's parameters, or give the optimizer "
            "all of the operator's"
        )


def _enumeration(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _compose(
    op: CurvatureOperator,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[tuple[Group, Filter]],
    grad_norm: float | None,
) -> Linearized:
    """Compose groups that differ, by the matrix of gradient descent with the same edges.

    J is the symmetric Jacobian of the gradient, A the diagonal of the groups' `rate` (divided by P
    for AdamW), and W that of their weight decays (times P for AdamW). Let G(z) be the diagonal of
    the groups' transfer functions, so that y = -G(z) J y for a mode y with the multiplier z, or
    (G(z)^-1 + J) y = 0. For heavy ball, Nesterov's method and AdamW, with any hyperparameters and
    with extrapolations that `composes` of the filters allows, the imaginary part of G^-1 is
    positive on the upper half of the unit circle. Then so is that of y* (G^-1 + J) y, and no
    multiplier other than 1 and -1 lies on the circle. All multipliers lie inside if G^-1 + J is
    positive definite at 1 and negative definite at -1:

        0 <= A^1/2 (J + W) A^1/2 <= 2

    For AdamW, whose weight decay is no part of its gradient, the right-hand inequality, which comes
    from G(-1), has W multiplied by (1 + beta1) / (1 - beta1) lr / (lr + 2 e).
    """
    members = [f for _, f in groups]
    rated = [(g, f) for g, f in groups if isinstance(f, AdamW | PolynomialFilter)]
    if not all(f.composes for _, f in rated):
        raise NoFilter(
            "the groups differ, and with an extrapolation of one of them complex multipliers "
            "decide (one far back, or of AdamW one far ahead with a large weight decay): "
            "their filters do not compose"
        )
    if len({bool(g.get("maximize")) for g, _ in groups}) > 1:
        raise NoFilter("the groups differ in maximize: no symmetric matrix has their stability")
    rho, ascent = _ascents(op, optimizer, [g for g, _ in groups], grad_norm)
    scale = spread(op, [(g, f.rate) for g, f in rated]).sqrt()
    decay = spread(op, [(g, float(g["weight_decay"])) for g, _ in groups])
    sign = -1.0 if groups[0][0].get("maximize") else 1.0

    def build(decay: Tensor) -> PreconditionedOperator:
        return PreconditionedOperator(op, scale, rho, decay, sign, ascent)

    rest, words, lower = "W", "", None
    if isinstance(members[0], AdamW):
        P = preconditioner(optimizer, op.params).to(op.dtype).pow(-2)
        scale, decay = scale / P.sqrt(), decay * P
        rest, words = "P W", " over P of AdamW now"
        if bool(decay.any()):
            lower = build(decay)
            words += ", and W times (1 + beta1) / (1 - beta1)"
            if any(g.get("extrapolation") for g, _ in groups):
                words += " lr / (lr + 2 e)"
            words += " at the upper edge"
        decay = P * spread(op, [(g, f.edge_decay) for g, f in groups if isinstance(f, AdamW)])
    operator = build(decay)
    inner = _jacobian(operator, ascent, f" + {rest}" if bool(decay.any()) else "")
    return Linearized(
        operator,
        f"A^1/2 {inner} A^1/2, A the groups' rates{words}",
        HeavyBall(1.0),
        scale,
        lower,
        operator.products,
        _notes(members),
    )


def _ascents(
    op: CurvatureOperator,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    grad_norm: float | None,
) -> tuple[Tensor | float, tuple[float, float]]:
    """Return R and (a, b) of `PreconditionedOperator`.

    Raises:
        NoFilter: the Jacobian of the gradient is not known, or not symmetric.
    """
    ascent = perturbation_of(optimizer)
    radii = {radius_of(optimizer, g) for g in groups} - {0.0}
    if not radii:
        return 0.0, (1.0, 0.0)
    theory, options = ascent.theory, ascent.filter_options
    if theory is None:
        raise NoFilter(f"no filter is known after an ascent of {ascent.title}")
    if theory.takes("grad_norm"):
        if not grad_norm:
            raise NoFilter("SAM's edge moves with the gradient norm: pass grad_norm")
        options = options | {"grad_norm": grad_norm}
    members = {rho: theory(1.0, rho=rho, **options) for rho in {0.0, *radii}}
    a, b, power = members[0.0].terms
    if power == 1:
        return spread(op, [(g, members[float(g["rho"])].radius) for g in groups]), (a, b)
    if len(radii) > 1:
        raise NoFilter(
            f"the groups of {theory.title} differ in rho: no symmetric matrix has their stability"
        )
    # H + a r H^3 is H + a H R H R H with R = r^1/2.
    return spread(op, [(g, members[float(g["rho"])].radius ** 0.5) for g in groups]), (0.0, a)


def _jacobian(operator: PreconditionedOperator, ascent: tuple[float, float], rest: str = "") -> str:
    """Return the inner matrix as text."""
    terms = ["H"]
    if operator.products > 1:
        for factor, term in zip(ascent, ("H R H", "H R H R H"), strict=True):
            terms += [term if factor == 1 else f"{factor:g} {term}"] if factor else []
    text = " + ".join(terms) + rest
    return f"({text})" if " " in text else text


def has_preconditioner(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> bool:
    """Return whether AdamW has taken a step, not a skipped one, of any of these parameters."""
    return any(_has_stepped(optimizer.state.get(p, {})) for p in params)


def _has_stepped(state: Mapping[str, Any]) -> bool:
    return "exp_avg_sq" in state and float(state["step"]) > 0


def preconditioner(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Tensor:
    """Return the diagonal [n] of AdamW's P^-1/2 for these parameters; ones before the first step.

    If parameters are sharded, it is this process's slice, as in `spread`.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for p in params:
        state = optimizer.state.get(p, {})
        group = group_of.get(id(p))
        if group is None or not _has_stepped(state):
            parts.append(torch.ones_like(_distributed.local(p).detach()).reshape(-1))
            continue
        v = _distributed.local(state["exp_avg_sq"])
        v = read(v, state.get("exp_avg_sq_scale"), v.dtype)
        corrected = v / (1 - group["betas"][1] ** float(state["step"]))
        parts.append((corrected.sqrt() + group["eps"]).rsqrt().reshape(-1))
    return torch.cat(parts)


def spread(op: CurvatureOperator, values: Iterable[tuple[Group, float]]) -> Tensor:
    """Return a vector [n] over the operator's parameters that has the value of each one's group.

    Parameters in no group get 0.
    """
    value_of = {id(p): value for group, value in values for p in group["params"]}
    sizes = [(_distributed.local(p).numel(), value_of.get(id(p), 0.0)) for p in op.params]
    return torch.cat([torch.full((n,), x, dtype=op.dtype, device=op.device) for n, x in sizes])


def perturbation_of(optimizer: torch.optim.Optimizer) -> Perturbation:
    """Return how an optimizer ascends before its gradient; torch's own do not."""
    perturbation: Perturbation = getattr(optimizer, "perturbation", None) or Perturbation()
    return perturbation


def radius_of(optimizer: torch.optim.Optimizer, group: Group) -> float:
    """Return the rho of a group's ascents, 0 where the optimizer is known to take none."""
    perturbation: Perturbation | None = getattr(optimizer, "perturbation", None)
    ascends = perturbation is None or perturbation.count > 0
    return float(group.get("rho", 0.0)) if ascends else 0.0


def _notes(flts: Sequence[Filter]) -> tuple[str, ...]:
    notes = []
    for norm in {f.grad_norm for f in flts if isinstance(f, SAM)}:
        notes.append(f"a gradient norm held fixed at {norm:.3g}: SAM's edge moves with it")
    for norm in {f.momentum_norm for f in flts if isinstance(f, MSAM)}:
        notes.append(f"a momentum norm held fixed at {norm:.3g}: MSAM's edge moves with it")
    if isinstance(flts[0], AdamW):
        notes.append("AdamW's preconditioner held fixed as it is")
    decays = any(getattr(f, "weight_decay", 0.0) > 0 for f in flts)
    if decays and not all(isinstance(f, HeavyBall) for f in flts):
        notes.append("exact except for a term of first order in weight decay")
    return tuple(notes)
