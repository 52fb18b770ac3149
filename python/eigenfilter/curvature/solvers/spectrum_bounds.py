"""Both ends of a spectrum from one random start, with the probability that they were seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.estimates import check_real
from eigenfilter.curvature.solvers.krylov_schur import KrylovSchur


@dataclass(frozen=True)
class SpectrumBound:
    """One end of a spectrum.

    Attributes:
        value: theta, the outermost Ritz value; the extreme eigenvalue lies no further in.
        residual: an eigenvalue lies within it of theta.
        margin: the extreme eigenvalue lies no further out than this beyond theta, but for the
            failure probability.
    """

    value: float
    residual: float
    margin: float


@dataclass(frozen=True, eq=False)
class SpectrumBounds:
    """Both ends of the spectrum of a symmetric H [n, n], and how far they can be trusted.

    Attributes:
        top: the largest eigenvalue.
        bottom: the smallest one.
        values: [k], all Ritz values, ascending; on the host, in float64.
        residuals: [k], of each; an eigenvalue of H lies within residuals[i] of values[i].
        failure_probability: of either `margin` being too small; over random starts, for any H.
        rounding: what the products are taken to err by; it is part of every margin and residual.
        matvecs: products used, k.
        exhausted: whether more products would tell no more: the Krylov space is invariant.
        n: the dimension.
    """

    top: SpectrumBound
    bottom: SpectrumBound
    values: Tensor
    residuals: Tensor
    failure_probability: float
    rounding: float
    matvecs: int
    exhausted: bool
    n: int

    @property
    def scale(self) -> float:
        """max |theta|, from below the norm of H."""
        return max(abs(self.top.value), abs(self.bottom.value))

    def products_for(self, distance: float) -> int | None:
        """How many products at most bring the margin down to `distance`, whatever the spectrum.

        None where rounding stands in the way. By Kuczynski and Wozniakowski, so often far too many.
        """
        spread = self.top.value + self.top.margin - self.bottom.value + self.bottom.margin
        if self.exhausted or not distance > 2 * self.rounding:
            return None
        share = (distance - self.rounding) / (spread + 2 * (distance - self.rounding))
        start = smallest_start(self.n, self.failure_probability)
        return math.ceil((math.acosh(1 / start) / math.atanh(math.sqrt(share)) + 1) / 2)


@torch.no_grad()
def spectrum_bounds(
    op: SymmetricOperator,
    failure_probability: float = 1e-3,
    max_matvecs: int = 300,
    *,
    enough: Callable[[SpectrumBounds], bool] = lambda found: False,
    basis_device: torch.device | str | None = None,
    seed: int,
) -> SpectrumBounds:
    r"""Find both ends of a spectrum by Lanczos' iteration, and how far they may lie beyond.

    From b uniform on the sphere, with Q [n, k] kept orthogonal, p_k the characteristic polynomial
    of T and beta_j its lower diagonal, u a unit eigenvector of the largest eigenvalue lambda:

        H Q = Q T + beta_k q_{k+1} e_k^T,    <q_{k+1}, u> = p_k(lambda) <b, u> / (beta_1 ... beta_k)

    The left side is at most 1. So where |<b, u>| >= r, lambda <= t with t the root beyond theta of

        p_k(t) = beta_1 ... beta_k / r                                                          (1)

    and, by Chebyshev's polynomials, whatever the spectrum, with s = lambda_max - lambda_min,

        lambda - theta <= eps s,    sqrt(eps) = tanh(arcosh(1 / r) / (2 k - 1))                 (2)

    The density of <b, u> is at most sqrt(n / (2 pi)), hence P[|<b, u>| < r] <= r sqrt(2 n / pi).
    r is chosen to make this half the failure probability: then (1) and (2) hold at both ends with
    the rest, for all k at once, so that it does no harm to stop when the result pleases. There
    s <= (theta_max - theta_min) / (1 - 2 eps). `margin` is the smaller of (1) and (2), and rounding.

    All this is of exact arithmetic. Orthogonality is kept to rounding, so that T is exact for a
    matrix within some eps ||H|| of H, and 10 eps ||H|| is added to residuals and margin; that b
    stays random with regard to that matrix is not proven. In float32, where eps is as large as r
    once n nears 10^7, this is the weaker part.

    Memory: n (max_matvecs + 1) elements. A product takes four passes over Q at most.

    Args:
        op: H; float32 or float64.
        failure_probability: in (0, 1), of either margin being too small.
        max_matvecs: the most products, >= 1.
        enough: told what is known every few products; True ends the search.
        basis_device: where Q lies, "cpu" for the host's memory; None for with the operator.
        seed: of b, which must not depend on H: not the one the model was made with.

    Raises:
        ValueError: an argument is out of its range.
        FloatingPointError: a product is not finite.

    Source: (1): J. van Dorsselaer, M. Hochstenbach, H. van der Vorst, Computing probabilistic
    bounds for extreme eigenvalues of symmetric matrices with the Lanczos method, SIAM J. Matrix
    Anal. Appl. 22 (2000). (2): J. Kuczynski, H. Wozniakowski, Estimating the largest eigenvalue by
    the power and Lanczos algorithms with a random start, ibid. 13 (1992), theorem 4.2, where the
    probability is put as 1.648 sqrt(n) exp(-sqrt(eps) (2 k - 1)) for s = lambda_max of a positive
    definite H; H - lambda_min I has the same Krylov spaces.
    """
    check_real(op)
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), not {failure_probability}")
    if max_matvecs < 1:
        raise ValueError(f"max_matvecs must be at least 1, not {max_matvecs}")
    device = op.device if basis_device is None else torch.device(basis_device)
    with getattr(op, "fixed", nullcontext)():
        run = KrylovSchur(op, max_matvecs, 1, seed, device)
        run.begin()
        due = 1
        while True:
            while run.products < min(due, max_matvecs) and not run.closed:
                run.step(1)
            found = _read(run, failure_probability)
            if run.closed or run.products >= max_matvecs or enough(found):
                return found
            due = run.products + 1 + run.products // 20


def smallest_start(n: int, failure_probability: float) -> float:
    """r, above which b [n] lies along both extreme eigenvectors but for that probability."""
    return min(0.5 * failure_probability * math.sqrt(0.5 * math.pi / n), 1.0)


def worst_share(k: int, start: float) -> float:
    """eps of (2) after k products, for r = start."""
    return math.tanh(math.acosh(1 / start) / (2 * k - 1)) ** 2


def _read(run: KrylovSchur, failure_probability: float) -> SpectrumBounds:
    ritz = run.collect()
    values = torch.from_numpy(ritz.values)
    residuals = run.scale.up(torch.from_numpy(ritz.residuals + run.rounding))
    n = run.ops.dimension
    start = smallest_start(n, failure_probability)
    # Where Q is invariant to rounding, what lies along b by less than that was not seen.
    betas = run.betas.clamp_min(run.rounding)
    rest = worst_share(run.size, start)
    spread = float(values[-1] - values[0])
    most = rest / (1 - 2 * rest) * spread if rest < 0.5 else math.inf

    def end(gaps: Tensor, index: int) -> SpectrumBound:
        seen = 0.0 if run.whole else min(_beyond(gaps, betas, start), most)
        value, margin = map(run.scale.up, (float(values[index]), seen + run.rounding))
        return SpectrumBound(value, float(residuals[index]), margin)

    return SpectrumBounds(
        top=end(values[-1] - values, -1),
        bottom=end(values - values[0], 0),
        values=run.scale.up(values),
        residuals=residuals,
        failure_probability=failure_probability,
        rounding=run.scale.up(run.rounding),
        matvecs=run.products,
        exhausted=run.closed,
        n=n,
    )


def _beyond(gaps: Tensor, betas: Tensor, start: float) -> float:
    """How far beyond its outermost root p_k reaches beta_1 ... beta_k / r.

    gaps: [k], of the roots from that one; 0 is among them.
    """
    target = float(betas.log().sum()) - math.log(start)  # -inf where H = 0
    if target == -math.inf:
        return 0.0
    high = target / len(gaps)  # every factor is at least x
    low = target - float((gaps + math.exp(high)).log().sum()) + high
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = float((gaps + math.exp(middle)).log().sum()) < target
        low, high = (middle, high) if below else (low, middle)
    return math.exp(high)
