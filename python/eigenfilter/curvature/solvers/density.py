"""Spectral densities of an operator by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.batched_lanczos import BatchedLanczos
from eigenfilter.curvature.solvers.estimates import (
    Estimate,
    check_finite,
    check_real,
    normals,
    signs,
)
from eigenfilter.curvature.solvers.power_of_two_scale import PowerOfTwoScale
from eigenfilter.curvature.solvers.result import EigenResult
from eigenfilter.curvature.solvers.vector_ops import VectorOps

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """A density of eigenvalues: a quadrature from each probe, and the deflated eigenvalues.

        phi(t) = (1/n) sum_i delta(t - lambda_i)
               ~ (1/n) sum_deflated delta(t - lambda) + (1 - k/n) (1/p) sum_pj w_pj delta(t - t_pj)

    Attributes:
        nodes: [p, m], the Ritz values of each probe, ascending, in float64.
        weights: [p, m], which sum to 1 for each probe.
        deflated: [k], the eigenvalues that were deflated; their part of the density is exact.
        n: dimension of the operator.
        matvecs: number of products.
    """

    nodes: Tensor
    weights: Tensor
    deflated: Tensor
    n: int
    matvecs: int

    def __call__(self, grid: Any, sigma: float | None = None) -> Tensor:
        """Return the density [g] at the points of `grid` [g], smoothed by a Gaussian.

        Args:
            grid: points [g].
            sigma: standard deviation of the Gaussian, > 0; by default 1% of the spectrum's range.

        Raises:
            ValueError: sigma is not positive.
        """
        at, mass = self.measure()
        points = torch.as_tensor(grid, dtype=torch.float64)
        if sigma is None:
            sigma = 0.01 * _width(at)
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, not {sigma}")
        z = (points[:, None] - at) / sigma
        return (torch.exp(-0.5 * z * z) @ mass) / (sigma * math.sqrt(2 * math.pi))

    def histogram(self, edges: Any) -> Tensor:
        """Return the share of eigenvalues [g - 1] in each [edges[i], edges[i + 1])."""
        at, mass = self.measure()
        ends = torch.as_tensor(edges, dtype=torch.float64)
        bins = torch.bucketize(at, ends, right=True)
        shares = torch.zeros(len(ends) + 1, dtype=torch.float64).index_add_(0, bins, mass)
        return shares[1:-1]

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return all nodes, ascending, and their masses, which sum to 1."""
        p, k = len(self.nodes), len(self.deflated)
        at = torch.cat([self.deflated, self.nodes.flatten()])
        mass = torch.cat(
            [
                torch.full_like(self.deflated, 1 / self.n),
                self.weights.flatten() * ((self.n - k) / self.n / p),
            ]
        )
        order = at.argsort()
        return at[order], mass[order]

    def moment(self, power: int) -> Estimate:
        """Estimate the mean of lambda^power over all eigenvalues, from the spread of the probes."""
        exact = (self.deflated**power).sum() / self.n
        of_probes = (self.weights * self.nodes**power).sum(1)
        return Estimate.of(exact + (self.n - len(self.deflated)) / self.n * of_probes)

    @property
    def trace(self) -> Estimate:
        """The sum of all eigenvalues."""
        mean = self.moment(1)
        return Estimate(self.n * mean.value, self.n * mean.standard_error, mean.samples)

    def plot(
        self, ax: Axes | None = None, *, sigma: float | None = None, points: int = 1000
    ) -> Any:
        """Draw the smoothed density on a logarithmic scale; return the axes. Needs matplotlib."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.gca()
        at, _ = self.measure()
        low, high = float(at[0]), float(at[-1])
        width = _width(at)
        margin = 0.05 * width
        grid = torch.linspace(low - margin, high + margin, points, dtype=torch.float64)
        ax.semilogy(grid.numpy(), self(grid, sigma).clamp_min(1e-12 / width).numpy())
        ax.set_ylim(bottom=0.01 / self.n / width)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        return ax


@torch.no_grad()
def spectral_density(
    op: SymmetricOperator,
    probes: int = 8,
    steps: int = 80,
    *,
    deflate: EigenResult | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """Estimate the density of all eigenvalues by stochastic Lanczos quadrature.

    From each of p random vectors with elements 1 and -1, the Lanczos three-term recurrence runs for
    m steps. The eigenvalues of its tridiagonal matrix, with the squared first elements of its
    eigenvectors as weights, are a Gauss quadrature of the density that the probe sees. All probes
    take a step together, as one block of products. No basis is kept: if loss of orthogonality
    repeats an eigenvalue, its copies share the weight of one.

    Memory: 3 vectors for each probe, up to 6 more during a step, and the deflated vectors.

    Args:
        op: the operator, in float32 or float64.
        probes: number p of random vectors, >= 1; the error falls as 1 / sqrt(n p).
        steps: number m of products with each, >= 1; the quadrature has the first 2 m - 1 moments of
            what a probe sees.
        deflate: eigenpairs found before, by `eigsh`. Their part of the density is then exact, and
            the probes, which stay orthogonal to them, see the rest. Only converged pairs count.
        seed: seed of the random vectors; the global generator is not used.

    Returns:
        The density.

    Raises:
        ValueError: an argument is out of its range, or `deflate` has another dimension.
        FloatingPointError: a product is not finite.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import HessianOperator, spectral_density
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = HessianOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> density = spectral_density(op, probes=4, steps=2)  # the Hessian is x^T x
        >>> [round(share, 6) for share in density.histogram([0.0, 5.0, 10.0]).tolist()]
        [0.5, 0.5]
        >>> round(float(density.trace), 6)
        10.0

    Source: S. Ubaru, J. Chen, Y. Saad, 2017, doi 10.1137/16M1104974; G. Golub, J. Welsch, 1969.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes and steps must be at least 1, not {probes} and {steps}")
    n = op.shape[0]
    check_real(op)
    ops = VectorOps(op)
    deflation = _deflation_basis(op, deflate, ops.length)
    values = torch.empty(0, dtype=torch.float64)
    if deflate is not None:
        values = deflate.values[deflate.converged].double().cpu()
    if len(deflation) == n:
        nothing = torch.empty(probes, 0, dtype=torch.float64)
        return SpectralDensity(nothing, nothing, values, n, 0)
    q = (normals if len(deflation) else signs)(op, probes, ops.generator(seed, op.device))
    if len(deflation):  # projections of normal vectors are normal, so directions are unbiased
        ops.orthogonalize(q, deflation)
    q /= ops.dot(q, q).sqrt()[:, None]
    recurrence = BatchedLanczos(ops, q, deflation)
    scale = PowerOfTwoScale(ops)
    alpha = torch.zeros(probes, steps, dtype=torch.float64, device=op.device)
    beta = torch.zeros_like(alpha)
    with getattr(op, "fixed", nullcontext)():
        for j in range(steps):
            w = scale.down(op.matmat(recurrence.q.T)).T.contiguous()
            alpha[:, j], beta[:, j] = recurrence.step(w)
    alpha, beta = alpha.cpu(), beta.cpu()
    check_finite(alpha, beta)
    nodes, weights = _quadratures(alpha, beta, torch.finfo(op.dtype).eps)
    return SpectralDensity(scale.up(nodes), weights, values, n, probes * steps)


def log_determinant(
    op: SymmetricOperator,
    damping: float = 0.0,
    probes: int = 8,
    steps: int = 80,
    *,
    deflate: EigenResult | None = None,
    seed: int = 0,
) -> Estimate:
    """Estimate log det(A + damping I) by stochastic Lanczos quadrature.

    Args:
        op: the operator A, in float32 or float64.
        damping: number that is added to every eigenvalue, >= 0.
        probes: number of random vectors, as in `spectral_density`.
        steps: number of products with each, as in `spectral_density`.
        deflate: eigenpairs found before, as in `spectral_density`.
        seed: seed of the random vectors.

    Returns:
        The estimate.

    Raises:
        ValueError: a Ritz value plus damping is not positive and has no logarithm; raise damping.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import HessianOperator, log_determinant
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = HessianOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> determinant = log_determinant(op, damping=1.0, steps=2).value.exp()
        >>> round(float(determinant), 6)  # (9 + 1) (1 + 1), as the Hessian is x^T x
        20.0

    Source: S. Ubaru, J. Chen, Y. Saad, 2017, doi 10.1137/16M1104974.
    """
    density = spectral_density(op, probes, steps, deflate=deflate, seed=seed)
    at, mass = density.measure()
    lowest = float(at[mass > 0].min())
    if not lowest + damping > 0:
        raise ValueError(
            f"an eigenvalue estimate plus damping is {lowest + damping:.3g}, not positive: raise "
            f"damping above {-lowest:.3g}"
        )
    exact = (density.deflated + damping).log().sum()
    shifted = torch.where(density.weights > 0, density.nodes + damping, 1.0)  # the log of 1 is 0
    of_probes = (density.weights * shifted.log()).sum(1)
    return Estimate.of(exact + (density.n - len(density.deflated)) * of_probes)


def _quadratures(alpha: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of each probe's tridiagonal matrix.

    Where a recurrence ended, nodes that follow have the weight 0.
    """
    above = torch.cat([torch.zeros(len(alpha), 1, dtype=torch.float64), beta[:, :-1]], dim=1)
    norm = (above + alpha.abs() + beta).amax(1, keepdim=True)
    # What follows a beta of rounding's size has no part along the probe.
    ended = (beta[:, :-1] <= 8 * eps * norm).long().cumsum(1).bool()
    off = beta[:, :-1].masked_fill(ended, 0.0)
    t = torch.diag_embed(alpha) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(t)
    return nodes, vectors[:, 0].square()


def _width(at: Tensor) -> float:
    """Return the width of the range of eigenvalues; if there is one only, its size or 1."""
    low, high = float(at.min()), float(at.max())
    return high - low or abs(high) or 1.0


def _deflation_basis(op: SymmetricOperator, deflate: EigenResult | None, length: int) -> Tensor:
    """Return the converged vectors as rows [k, l] of this length."""
    if deflate is None:
        return torch.empty(0, length, dtype=op.dtype, device=op.device)
    if deflate.vectors.shape[0] != length:
        raise ValueError(
            f"deflate has vectors of dimension {deflate.vectors.shape[0]}, the operator "
            f"{length}: pass the result of eigsh on this operator"
        )
    return deflate.vectors[:, deflate.converged].T.to(op.device, op.dtype).contiguous()
