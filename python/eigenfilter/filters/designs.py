"""Design: the rho or the lr that puts the edge at a given eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Mapping

from eigenfilter.filters.methods import SAM, USAM, HeavyBall, HessianUSAM, Nesterov, TwoStepUSAM
from eigenfilter.filters.stability import PolynomialFilter, real_roots

# Coefficients of p(lambda) / lambda in s = rho lambda^power, lowest power first, and the power.
_IN_RHO: Mapping[tuple[str, str], tuple[tuple[float, ...], int]] = {
    ("usam", ""): ((1.0, 1.0), 1),
    ("sam", ""): ((1.0, 1.0), 1),
    ("two_step_usam", "sequential"): ((1.0, 2.0, 1.0), 1),
    ("two_step_usam", "anchored"): ((1.0, 1.0, 1.0), 1),
    ("hessian_usam", ""): ((1.0, 1.0), 2),
}
METHODS = ("sgd", "usam", "sam", "two_step_usam", "hessian_usam")


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
) -> float:
    """Return the rho or the lr with which the filter of a method ends at a given eigenvalue.

    Given lr, rho solves lr (1 - dampening) (p_rho(max_eigenvalue) + wd) = the edge of the momentum
    (see `PolynomialFilter`); given rho, the same equation is solved for lr.

    Args:
        method: "sgd" (for lr only), "usam", "sam", "two_step_usam" or "hessian_usam".
        max_eigenvalue: upper edge of the admitted set, greater than 0.
        lr: learning rate, greater than 0, to get rho; or None.
        rho: radius of the ascent, at least 0, to get lr; or None.
        momentum, dampening, weight_decay, nesterov: arguments of the filter.
        ascent: form of "two_step_usam": "sequential", the default, or "anchored".
        grad_norm: gradient norm of "sam", at which its edge is max_eigenvalue.

    Raises:
        ValueError: a value is out of its range, not exactly one of lr and rho is given, or lr alone
            puts the edge below max_eigenvalue, so that no rho >= 0 exists. The message then names
            the largest lr.

    >>> rho = design("usam", 8.0, lr=0.1, momentum=0.5)
    >>> round(USAM(0.1, 0.5, rho=rho).max_eigenvalue(), 9)
    8.0
    >>> design("sgd", 30.0, momentum=0.5)
    0.1
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if not 0 < max_eigenvalue < math.inf:
        raise ValueError(f"max_eigenvalue must be positive and finite, got {max_eigenvalue}")
    if ascent is not None and method != "two_step_usam":
        raise ValueError(f"ascent is an argument of two_step_usam, not of {method}")
    if grad_norm is not None and method != "sam":
        raise ValueError(f"grad_norm is an argument of sam, not of {method}")
    ascent = "sequential" if ascent is None else ascent
    rest = (momentum, dampening, weight_decay)

    def build(lr: float, rho: float) -> PolynomialFilter:
        if method == "sgd":
            return (Nesterov if nesterov else HeavyBall)(lr, *rest)
        if method == "usam":
            return USAM(lr, *rest, rho=rho, nesterov=nesterov)
        if method == "sam":
            if grad_norm is None:
                raise ValueError("SAM's edge moves with the gradient's norm: give grad_norm")
            return SAM(lr, *rest, rho=rho, nesterov=nesterov, grad_norm=grad_norm)
        if method == "two_step_usam":
            return TwoStepUSAM(lr, *rest, rho=rho, nesterov=nesterov, ascent=ascent)
        return HessianUSAM(lr, *rest, rho=rho, nesterov=nesterov)

    if method == "sgd":
        if lr is not None or rho is not None:
            raise ValueError("sgd has no rho: give neither lr nor rho to get the lr")
        rho = 0.0
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
        return edge / target
    assert lr is not None
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    ratio = (edge / lr - weight_decay) / max_eigenvalue
    if ratio < 1.0:
        highest = edge / (float(straight.p(max_eigenvalue)) + weight_decay)
        raise ValueError(
            f"lr = {lr:g} alone puts the edge below {max_eigenvalue:g}: take lr <= {highest}, "
            "and a rho to it"
        )
    poly, power = _IN_RHO[method, ascent if method == "two_step_usam" else ""]
    root = max(real_roots((poly[0] - ratio, *poly[1:])), default=0.0)
    radius = max(root, 0.0) / max_eigenvalue**power
    return radius * (grad_norm or 1.0) if method == "sam" else radius
