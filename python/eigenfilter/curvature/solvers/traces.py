"""Trace and diagonal of an operator, from products with random vectors."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.estimates import (
    Estimate,
    check_finite,
    check_real,
    signs,
)
from eigenfilter.curvature.solvers.power_of_two_scale import PowerOfTwoScale
from eigenfilter.curvature.solvers.vector_ops import VectorOps


@torch.no_grad()
def trace(op: SymmetricOperator, matvecs: int = 60, *, seed: int = 0) -> Estimate:
    """Estimate the trace by Hutch++.

        tr A = tr Q^T A Q + tr (I - Q Q^T) A (I - Q Q^T)

    Q is an orthonormal basis of A S, with as many random vectors S as a third of the products. The
    first term is exact and takes another third; the second is the mean over random vectors, with
    the last third. The relative error is O(1 / matvecs) for a positive semidefinite A, and never
    worse than Hutchinson's.

    Memory: at most 3.5 vectors for each product of a third.

    Args:
        op: the operator A, in float32 or float64.
        matvecs: number of products, >= 6; rounded down to a multiple of 3.
        seed: seed of the random vectors; the global generator is not used.

    Returns:
        The estimate, whose samples are those of the second term. It is exact, with an error of 0,
        if Q spans the whole space.

    Raises:
        ValueError: matvecs is below 6.
        FloatingPointError: a product is not finite.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import HessianOperator, trace
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = HessianOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> round(float(trace(op, matvecs=6)), 6)  # the Hessian is x^T x
        10.0

    Source: R. Meyer, C. Musco, C. Musco, D. Woodruff, 2021, arXiv 2010.09649.
    """
    if matvecs < 6:
        raise ValueError(f"matvecs must be at least 6, not {matvecs}")
    check_real(op)
    ops = VectorOps(op)
    third = matvecs // 3
    random = ops.generator(seed, op.device)
    scale = PowerOfTwoScale(ops)
    with getattr(op, "fixed", nullcontext)():
        basis = signs(op, min(third, ops.dimension), random)
        basis = ops.orthonormal(scale.down(op.matmat(basis.T)).T, random)
        exact = ops.dot(basis, scale.down(op.matmat(basis.T)).T).sum()
        if len(basis) == ops.dimension:
            check_finite(exact)
            return Estimate(scale.up(exact).cpu(), torch.zeros((), dtype=torch.float64), 1)
        probes = signs(op, third, random)
        ops.orthogonalize(probes, basis)
        del basis
        rest = ops.dot(probes, scale.down(op.matmat(probes.T)).T)
    check_finite(exact, rest)
    return Estimate.of(scale.up(exact + rest).cpu())


@torch.no_grad()
def diagonal(op: SymmetricOperator, probes: int = 100, *, seed: int = 0) -> Estimate:
    """Estimate the diagonal of A by the mean of s * (A s) over random vectors s.

    The elements of s are 1 and -1. Element i has the variance sum_{j != i} a_ij^2 / probes.

    Args:
        op: the operator A, in float32 or float64.
        probes: number of products, >= 1.
        seed: seed of the random vectors; the global generator is not used.

    Returns:
        The estimate, with value and standard error [n] (or a slice) on the operator's device.

    Raises:
        ValueError: probes is below 1.
        FloatingPointError: a product is not finite.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import HessianOperator, diagonal
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = HessianOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> diagonal(op, probes=2).value.tolist()  # exact, as the Hessian x^T x is diagonal
        [9.0, 1.0]

    Source: C. Bekas, E. Kokiopoulou, Y. Saad, 2007, doi 10.1016/j.apnum.2007.01.003.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, not {probes}")
    check_real(op)
    ops = VectorOps(op)
    mean = torch.zeros(ops.length, dtype=torch.float64, device=op.device)
    # The root of the sum of squares about the mean, by Welford's update. The squares themselves may
    # overflow or vanish, differently for each element.
    spread = torch.zeros_like(mean)
    random = ops.generator(seed, op.device)
    with getattr(op, "fixed", nullcontext)():
        for i in range(probes):
            s = signs(op, 1, random)[0]
            sample = (s * op.matvec(s)).double()
            deviation = sample - mean
            mean += deviation / (i + 1)
            torch.hypot(spread, deviation * math.sqrt(i / (i + 1)), out=spread)
    check_finite(ops.total(torch.where(mean.isfinite(), 0.0, torch.nan).sum()))
    if probes == 1:
        return Estimate(mean, torch.full_like(mean, torch.nan), probes)
    return Estimate(mean, spread / math.sqrt((probes - 1) * probes), probes)
