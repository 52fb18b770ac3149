"""Design: the rho, the extrapolation or the lr that puts the edge at a given eigenvalue."""

from __future__ import annotations

import math
from typing import Any

from eigenfilter.filters.adamw import design_adamw
from eigenfilter.filters.methods import METHODS, MSAM, AscentFilter, HeavyBall, Nesterov
from eigenfilter.filters.stability import PolynomialFilter, real_roots

_ADAMW = "adamw"


def design(
    method: str,
    max_eigenvalue: float,
    *,
    lr: float | None = None,
    rho: float | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    ascent: str | None = None,
    grad_norm: float | None = None,
    momentum_norm: float | None = None,
    beta1: float | None = None,
) -> float:
    """Return the rho or the lr with which the filter of a method ends at a given eigenvalue.

    Given lr, rho solves lr (1 - dampening) (p_rho(max_eigenvalue) + wd) = the edge of the momentum
    (see `PolynomialFilter`); given rho, the same equation is solved for lr. For "sgd" the result is
    the lr; or, given lr, the extrapolation e of `HeavyBall`, with which one gradient a step is
    enough: (lr + 2 e) (1 - dampening) (max_eigenvalue + wd) = 2 (1 + momentum). For "msam" e is rho
    / momentum_norm in this equation. For "adamw", whose edge is that of the preconditioned Hessian,
    it is likewise the lr or the extrapolation of `AdamW`: (lr + 2 e) (1 - beta1) max_eigenvalue =
    (1 + beta1) (2 - lr wd).

    Args:
        method: "sgd", "msam", "usam", "sam", "two_step_usam", "hessian_usam" or "adamw".
        max_eigenvalue: upper edge of the admitted set, greater than 0.
        lr: learning rate, greater than 0, to get rho or the extrapolation; or None.
        rho: radius of the ascent, at least 0, to get lr; or None.
        momentum, dampening, weight_decay, nesterov: arguments of the filter.
        ascent: form of "two_step_usam": "sequential", the default, or "anchored".
        grad_norm: gradient norm of "sam", at which its edge is max_eigenvalue.
        momentum_norm: norm of the momentum buffers of "msam", at which its edge is max_eigenvalue.
        beta1: decay rate of the first moment of "adamw", by default 0.9.

    Raises:
        ValueError: a value is out of its range, not exactly one of lr and rho is given, or lr alone
            puts the edge below max_eigenvalue, so that no rho or extrapolation of at least 0
            exists. The message then names the largest lr.

    >>> from eigenfilter.filters import USAM
    >>> rho = design("usam", 8.0, lr=0.1, momentum=0.5)
    >>> round(USAM(0.1, 0.5, rho=rho).max_eigenvalue(), 9)
    8.0
    >>> design("sgd", 30.0, momentum=0.5)
    0.1
    >>> round(design("sgd", 10.0, lr=0.1, momentum=0.5), 9)
    0.1
    >>> round(design("adamw", 10000.0, lr=1e-3), 9)
    0.0014
    """
    if method not in (*METHODS, _ADAMW):
        known = ", ".join((*METHODS, _ADAMW))
        raise ValueError(f"unknown method {method!r}: choose one of {known}")
    if not 0 < max_eigenvalue < math.inf:
        raise ValueError(f"max_eigenvalue must be positive and finite, got {max_eigenvalue}")
    own = {"ascent": ascent, "grad_norm": grad_norm, "momentum_norm": momentum_norm}
    if method == _ADAMW:
        others = own | {"rho": rho, "momentum": momentum, "dampening": dampening}
        given = [name for name, value in (others | {"nesterov": nesterov}).items() if value]
        if given:
            raise ValueError(f"{given[0]} is not an argument of adamw: leave it out")
        return design_adamw(max_eigenvalue, lr, 0.9 if beta1 is None else beta1, weight_decay)
    if beta1 is not None:
        raise ValueError(f"beta1 is an argument of adamw, not of {method}")
    theory = METHODS[method]
    options: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    for name in options:
        if not theory.takes(name):
            owner = next(each for each, cls in METHODS.items() if cls.takes(name))
            raise ValueError(f"{name} is an argument of {owner}, not of {method}")
    if theory.takes("grad_norm") and grad_norm is None:
        raise ValueError("SAM's edge moves with the gradient's norm: give grad_norm")
    if theory.takes("momentum_norm"):
        if momentum_norm is None:
            raise ValueError("MSAM's edge moves with the momentum's norm: give momentum_norm")
        if nesterov:
            raise ValueError("MSAM follows the buffer of heavy ball: leave nesterov out")
        MSAM(1.0, momentum, rho=rho or 0.0, momentum_norm=momentum_norm)  # checks them

    def build(lr: float, rho: float) -> PolynomialFilter:
        rest = (lr, momentum, dampening, weight_decay)
        if not issubclass(theory, AscentFilter):
            return (Nesterov if nesterov else HeavyBall)(*rest)
        return theory(*rest, rho=rho, nesterov=nesterov, **options)

    if not theory.takes("rho"):
        if rho is not None:
            raise ValueError(
                f"{method} has no rho: leave it out to get the lr, or give lr to get the "
                "extrapolation"
            )
        rho = 0.0 if lr is None else None
    if (lr is None) == (rho is None):
        raise ValueError("give lr to get rho, or rho to get lr: one of the two")
    straight = build(1.0, 0.0)
    if straight.rate == 0.0:
        raise ValueError(
            "with dampening 1 no parameter changes, so that there is no edge: take dampening < 1"
        )
    edge = 2.0 / straight.rate  # of lr (p + wd)
    if rho is not None:
        target = float(build(1.0, rho).p(max_eigenvalue)) + weight_decay
        ahead = 2.0 * rho / momentum_norm if momentum_norm is not None else 0.0
        if ahead >= edge / target:
            raise ValueError(
                f"rho = {rho:g} alone puts the edge below {max_eigenvalue:g}: take rho < "
                f"{edge / target * rho / ahead}"
            )
        return edge / target - ahead
    assert lr is not None
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    ratio = (edge / lr - weight_decay) / max_eigenvalue
    if ratio < 1.0:
        highest = edge / (float(straight.p(max_eigenvalue)) + weight_decay)
        raise ValueError(
            f"lr = {lr:g} alone puts the edge below {max_eigenvalue:g}: take lr <= {highest}, "
            f"and {'a rho' if theory.takes('rho') else 'an extrapolation'} to it"
        )
    if issubclass(theory, HeavyBall):
        if momentum == 0.0 or nesterov:
            raise ValueError(
                "extrapolation follows the buffer of heavy ball: set momentum > 0, and no nesterov"
            )
        slope = (1.0 - dampening) * (max_eigenvalue + weight_decay)
        extrapolation = max((1.0 + momentum) / slope - 0.5 * lr, 0.0)
        return extrapolation if momentum_norm is None else extrapolation * momentum_norm
    unit = build(1.0, 1.0)
    assert isinstance(unit, AscentFilter)
    a, b, power = unit.terms
    root = max(real_roots((1.0 - ratio, a, b) if b else (1.0 - ratio, a)), default=0.0)
    return max(root, 0.0) / max_eigenvalue**power / unit.radius
