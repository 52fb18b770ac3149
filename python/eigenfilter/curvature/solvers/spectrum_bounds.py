"""Bounds of both ends of a spectrum from one random start, with their failure probability."""

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
        value: the outermost Ritz value theta; the extreme eigenvalue lies no further inside, up to
            rounding.
        residual: an eigenvalue lies within this distance of theta.
        margin: the extreme eigenvalue lies at most this far beyond theta, except with the failure
            probability.
    """

    value: float
    residual: float
    margin: float


@dataclass(frozen=True, eq=False)
class SpectrumBounds:
    """Both ends of the spectrum of a symmetric H [n, n], with their error bars.

    Attributes:
        top: the largest eigenvalue.
        bottom: the smallest eigenvalue.
        values: [k], all Ritz values, ascending, on the host in float64.
        residuals: [k], an eigenvalue of H lies within residuals[i] of values[i].
        failure_probability: the probability that a margin is too small, over random starts, for any
            H.
        rounding: the assumed rounding error of the products; every margin and residual contains it.
        matvecs: number of products, k.
        exhausted: whether further products would tell nothing new, because the Krylov space is
            invariant.
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
        """max |theta|, a lower bound of the norm of H."""
        return max(abs(self.top.value), abs(self.bottom.value))

    def products_for(self, distance: float) -> int | None:
        """Return a number of products that reduces both margins to `distance`, for any spectrum.

        It is the bound of Kuczynski and Wozniakowski, and often far more than needed. None if
        rounding makes `distance` impossible.
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
    enough: Callable[[SpectrumBounds], bool] = lambda bounds: False,
    basis_device: torch.device | str | None = None,
    seed: int,
) -> SpectrumBounds:
    r"""Bound both ends of a spectrum from outside and inside, by the Lanczos iteration.

    Let b be uniform on the sphere, Q [n, k] the orthogonal Lanczos basis, p_k the characteristic
    polynomial of T with subdiagonal beta_j, and u a unit eigenvector of the largest eigenvalue
    lambda:

        H Q = Q T + beta_k q_{k+1} e_k^T,    <q_{k+1}, u> = p_k(lambda) <b, u> / (beta_1 ... beta_k)

    The left side is at most 1. So where |<b, u>| >= r, lambda <= t, with t the root beyond theta of

        p_k(t) = beta_1 ... beta_k / r                                                          (1)

    and, by Chebyshev polynomials, for any spectrum, with s = lambda_max - lambda_min,

        lambda - theta <= eps s,    sqrt(eps) = tanh(arcosh(1 / r) / (2 k - 1))                 (2)

    The density of <b, u> is at most sqrt(n / (2 pi)), hence P[|<b, u>| < r] <= r sqrt(2 n / pi).
    r makes this half the failure probability. Then (1) and (2) hold at both ends with the remaining
    probability, for all k at once, so it is safe to stop as soon as the result is good enough, and
    s <= (theta_max - theta_min) / (1 - 2 eps). A margin is the smaller of (1) and (2), plus
    rounding.

    All this holds in exact arithmetic. Orthogonality is kept to rounding, so that T is exact for a
    matrix within some eps ||H|| of H, and 10 eps ||H|| is added to residuals and margins. It is not
    proven that b stays random with regard to that matrix. In float32, where eps is as large as r
    once n approaches 10^7, this is the weaker part.

    Memory: n (max_matvecs + 1) elements. A product takes at most four passes over Q.

    Args:
        op: the operator H, in float32 or float64.
        failure_probability: probability in (0, 1) that either margin is too small.
        max_matvecs: largest number of products, >= 1.
        enough: called with the present bounds every few products; True ends the search.
        basis_device: where Q lies: "cpu" for the host's memory, None for the operator's device.
        seed: seed of b, which must not depend on H; so not the one the model was created with.

    Returns:
        The bounds.

    Raises:
        ValueError: an argument is out of its range.
        FloatingPointError: a product is not finite.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import HessianOperator, spectrum_bounds
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = HessianOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> bounds = spectrum_bounds(op, seed=5)  # the Hessian is x^T x
        >>> print(f"{bounds.bottom.value:.6f} to {bounds.top.value:.6f}")
        1.000000 to 9.000000
        >>> bounds.top.margin < 1e-10
        True

    Source: (1): J. van Dorsselaer, M. Hochstenbach, H. van der Vorst, Computing probabilistic
    bounds for extreme eigenvalues of symmetric matrices with the Lanczos method, SIAM J. Matrix
    Anal. Appl. 22 (2000). (2): J. Kuczynski, H. Wozniakowski, Estimating the largest eigenvalue by
    the power and Lanczos algorithms with a random start, ibid. 13 (1992), theorem 4.2, which states
    the probability as 1.648 sqrt(n) exp(-sqrt(eps) (2 k - 1)) for s = lambda_max of a positive
    definite H; H - lambda_min I has the same Krylov spaces.
    """
    check_real(op)
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), not {failure_probability}")
    if max_matvecs < 1:
        raise ValueError(f"max_matvecs must be at least 1, not {max_matvecs}")
    device = op.device if basis_device is None else torch.device(basis_device)
    with getattr(op, "fixed", nullcontext)():
        krylov = KrylovSchur(op, max_matvecs, 1, seed, device)
        krylov.start()
        due = 1
        while True:
            while krylov.products < min(due, max_matvecs) and not krylov.closed:
                krylov.step(1)
            bounds = _bounds(krylov, failure_probability)
            if krylov.closed or krylov.products >= max_matvecs or enough(bounds):
                return bounds
            due = krylov.products + 1 + krylov.products // 20


def smallest_start(n: int, failure_probability: float) -> float:
    """Return r: |<b, u>| is above it for both extreme u, except with the failure probability."""
    return min(0.5 * failure_probability * math.sqrt(0.5 * math.pi / n), 1.0)


def worst_share(k: int, start: float) -> float:
    """Return eps of (2) after k products, for r = start."""
    return math.tanh(math.acosh(1 / start) / (2 * k - 1)) ** 2


def _bounds(krylov: KrylovSchur, failure_probability: float) -> SpectrumBounds:
    ritz = krylov.solve()
    values = torch.from_numpy(ritz.values)
    residuals = krylov.scale.up(torch.from_numpy(ritz.residuals + krylov.rounding))
    n = krylov.ops.dimension
    start = smallest_start(n, failure_probability)
    # Where Q is invariant up to rounding, a part of b smaller than that was not seen.
    betas = krylov.betas.clamp_min(krylov.rounding)
    share = worst_share(krylov.size, start)
    spread = float(values[-1] - values[0])
    most = share / (1 - 2 * share) * spread if share < 0.5 else math.inf

    def end(gaps: Tensor, index: int) -> SpectrumBound:
        beyond = 0.0 if krylov.whole else min(_beyond(gaps, betas, start), most)
        value, margin = map(krylov.scale.up, (float(values[index]), beyond + krylov.rounding))
        return SpectrumBound(value, float(residuals[index]), margin)

    return SpectrumBounds(
        top=end(values[-1] - values, -1),
        bottom=end(values - values[0], 0),
        values=krylov.scale.up(values),
        residuals=residuals,
        failure_probability=failure_probability,
        rounding=krylov.scale.up(krylov.rounding),
        matvecs=krylov.products,
        exhausted=krylov.closed,
        n=n,
    )


def _beyond(gaps: Tensor, betas: Tensor, start: float) -> float:
    """Return how far beyond its outermost root p_k reaches beta_1 ... beta_k / r, by bisection.

    gaps: [k], the distances of all roots from the outermost one, including its own, 0.
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
