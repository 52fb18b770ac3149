"""Trace and diagonal of an operator, from products with random vectors."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from eigenfilter import kernels
from eigenfilter.curvature.estimates import (
    Estimate,
    check_finite,
    check_real,
    draw_signs,
    generator,
    signs,
)
from eigenfilter.curvature.protocol import SymmetricOperator


@torch.no_grad()
def trace(op: SymmetricOperator, matvecs: int = 60, *, seed: int = 0) -> Estimate:
    """Estimate the trace by Hutch++.

        tr A = tr Q^T A Q + tr (I - Q Q^T) A (I - Q Q^T)

    with Q an orthonormal basis of A S for a third of the products' random vectors S; the first term
    is exact, the second the mean over another third. The relative error is O(1 / matvecs) for a
    positive semidefinite A, and never worse than Hutchinson's.

    Args:
        op: the operator; float32 or float64.
        matvecs: products to use, at least 6; rounded down to a multiple of 3.
        seed: of the random vectors.

    Returns:
        The estimate; its samples are those of the second term. Exact, with an error of 0, where Q
        spans the whole space.

    Raises:
        ValueError: matvecs is below 6.

    Source: R. Meyer, C. Musco, C. Musco, D. Woodruff, 2021, arXiv 2010.09649.
    """
    if matvecs < 6:
        raise ValueError(f"matvecs must be at least 6, not {matvecs}")
    check_real(op)
    n, third = op.shape[0], matvecs // 3
    with getattr(op, "fixed", nullcontext)():
        sketch = op.matmat(signs(op, min(third, n), seed).T)
        basis = torch.linalg.qr(sketch).Q.T.contiguous()
        images = op.matmat(basis.T).T
        exact = torch.linalg.vecdot(basis.double(), images.double()).sum()
        if len(basis) == n:
            check_finite(exact)
            return Estimate(exact.cpu(), torch.zeros((), dtype=torch.float64), 1)
        probes = signs(op, third, seed + 1)
        kernels.project_out(probes, basis)
        images = op.matmat(probes.T).T
    rest = torch.linalg.vecdot(probes.double(), images.double())
    check_finite(exact, rest)
    return Estimate.of((exact + rest).cpu())


@torch.no_grad()
def diagonal(op: SymmetricOperator, probes: int = 100, *, seed: int = 0) -> Estimate:
    """Estimate the diagonal: the mean of s * (A s) over random vectors of signs s.

    Element i has the variance sum_{j != i} a_ij^2 / probes.

    Args:
        op: the operator; float32 or float64.
        probes: the number of products, at least 1.
        seed: of the random vectors.

    Returns:
        The estimate, value and standard error [n] on the operator's device.

    Raises:
        ValueError: probes is below 1.

    Source: C. Bekas, E. Kokiopoulou, Y. Saad, 2007, doi 10.1016/j.apnum.2007.01.003.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, not {probes}")
    check_real(op)
    mean = torch.zeros(op.shape[0], dtype=torch.float64, device=op.device)
    spread = torch.zeros_like(mean)  # of the squares about the mean, by Welford's update
    random = generator(op, seed)
    with getattr(op, "fixed", nullcontext)():
        for i in range(probes):
            s = draw_signs(op, (op.shape[0],), random)
            sample = (s * op.matvec(s)).double()
            off = sample - mean
            mean += off / (i + 1)
            spread += off * (sample - mean)
    check_finite(mean)
    variance = spread / max(probes - 1, 1)
    error = (variance / probes).sqrt() if probes > 1 else torch.full_like(mean, torch.nan)
    return Estimate(mean, error, probes)
