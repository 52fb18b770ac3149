"""Base classes of the filters: stability of the linearized update, preimages of polynomials.

Near an equilibrium an optimizer steps along d(x), whose Jacobian is a polynomial p(H) of the
Hessian. Each eigenvalue lambda of H then evolves alone, by a 2x2 block that depends on lambda
through q = p(lambda) + weight_decay only.

Source: Bolte, Le, Pauwels, *Convergence of optimizers implies eigenvalues filtering at
equilibrium*, arXiv 2510.09034; the edges are Jury's conditions on that block.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]


def check_field(owner: Any, name: str, low: float, high: float, *, closed: bool = True) -> None:
    """Convert a frozen field to float and require it to lie in [low, high], or in [low, high).

    Raises:
        ValueError: it does not, or is not finite.
    """
    value = float(getattr(owner, name))
    inside = low <= value <= high if closed else low <= value < high
    if not (inside and math.isfinite(value)):
        bracket = "]" if closed and math.isfinite(high) else ")"
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}{bracket}, got {value}")
    object.__setattr__(owner, name, value)


class Filter(ABC):
    """The eigenvalues that an optimizer admits at the points it converges to."""

    @abstractmethod
    def intervals(self) -> list[Interval]:
        """The admitted eigenvalues: disjoint closed intervals, ascending; perhaps none."""

    @abstractmethod
    def spectral_radius(self, lam: ArrayLike) -> NDArray[np.float64]:
        """Spectral radius of one linearized step along an eigenvector, computed numerically.

        The step contracts if the radius is below 1.

        Args:
            lam: finite eigenvalues, any shape.

        Returns:
            float64 of the same shape.
        """

    def max_eigenvalue(self) -> float:
        """Upper edge of the admitted set; -inf if nothing is admitted."""
        return max((high for _, high in self.intervals()), default=-math.inf)

    def admits(self, lam: ArrayLike) -> NDArray[np.bool_]:
        """Whether each eigenvalue lies in one of the intervals, ends included.

        Args:
            lam: eigenvalues, any shape.

        Returns:
            bool array of the same shape; False for nan.
        """
        lam = np.asarray(lam, np.float64)
        admitted = np.zeros(lam.shape, np.bool_)
        for low, high in self.intervals():
            admitted |= (low <= lam) & (lam <= high)
        return admitted


@dataclass(frozen=True)
class PolynomialFilter(Filter):
    """The eigenvalues an optimizer admits at an equilibrium; a subclass defines its polynomial p.

    With q = p(lambda) + weight_decay (times 1 - dampening where momentum > 0), convergence from
    almost every start implies for every eigenvalue lambda of the Hessian there

        heavy ball:  0 <= lr q <= 2 (1 + momentum)
        Nesterov:    0 <= lr q <= (2 + 2 momentum) / (1 + 2 momentum)

    Args:
        lr: learning rate, at least 0. With 0 every eigenvalue is admitted.
        momentum: decay rate of the momentum buffer, in [0, 1).
        dampening: share of the gradient that stays out of the buffer, in [0, 1]. It has no effect
            at momentum 0, as in torch.
        weight_decay: coefficient of the L2 penalty, at least 0. The statement is exact if p(lambda)
            = lambda. For any other p the equilibrium has a nonzero gradient, and the statement
            holds up to a term of first order in weight_decay, which vanishes for a quadratic f: see
            docs/theory.md, 13.
        maximize: whether the optimizer maximizes f. Eigenvalues remain those of the Hessian of f,
            so p(lambda) becomes p(-lambda).

    Numbers may be 0-dim tensors.

    Attributes:
        method: name of the method.
        title: name of the method in text.
        gradients: number of gradients a step, of which a Hessian-vector product counts as one.

    Raises:
        ValueError: a value is outside its range.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    gradients: ClassVar[int] = 1

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    _: KW_ONLY
    nesterov: bool = field(default=False, init=False, repr=False)
    maximize: bool = False

    def __post_init__(self) -> None:
        check_field(self, "lr", 0.0, math.inf)
        check_field(self, "momentum", 0.0, 1.0, closed=False)
        check_field(self, "dampening", 0.0, 1.0)
        check_field(self, "weight_decay", 0.0, math.inf)
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise ValueError(
                "Nesterov needs momentum > 0 and dampening = 0, got "
                f"momentum={self.momentum}, dampening={self.dampening}: set both, or use heavy ball"
            )

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether the filter has an argument of this name, such as "grad_norm" or "ascent"."""
        return any(f.name == name for f in fields(cls))

    @classmethod
    def of_group(cls, group: Mapping[str, Any], **options: Any) -> PolynomialFilter:
        """The filter of a group of a live optimizer; `options` are the optimizer's own."""
        raise NotImplementedError

    @property
    @abstractmethod
    def ascending_coefficients(self) -> tuple[float, ...]:
        """Coefficients of p for a minimizing optimizer, lowest power first."""

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Coefficients of p in the eigenvalues of the Hessian of f, lowest power first."""
        sign = -1.0 if self.maximize else 1.0
        return tuple(c * sign**k for k, c in enumerate(self.ascending_coefficients))

    def p(self, lam: ArrayLike) -> NDArray[np.float64]:
        """Eigenvalue of the Jacobian of d for an eigenvalue `lam` of the Hessian.

        Args:
            lam: eigenvalues, any shape.

        Returns:
            p(lam), float64 of the same shape.
        """
        values = np.polynomial.polynomial.polyval(np.asarray(lam, np.float64), self.coefficients)
        return np.asarray(values, np.float64)

    def intervals(self) -> list[Interval]:
        """The admitted eigenvalues: disjoint closed intervals, ascending.

        The list is empty if weight decay alone exceeds the edge. The ends are infinite if lr = 0 or
        dampening = 1.
        """
        if self._gain == 0.0:
            return [(-math.inf, math.inf)]
        decay = self.weight_decay
        return preimage(self.coefficients, 0.0 - decay, self._edge / self._gain - decay)

    @property
    def composes(self) -> bool:
        """Whether the multipliers 1 and -1 alone decide, so that groups may be composed."""
        return True

    @property
    def rate(self) -> float:
        """The lr of gradient descent without momentum that has the same edges."""
        return 2.0 * self._gain / self._edge

    @property
    def _gain(self) -> float:
        return self.lr * (1.0 - self.dampening if self.momentum > 0.0 else 1.0)

    @property
    def _edge(self) -> float:
        """The largest lr q admitted, times 1 - dampening."""
        edge = 2.0 * (1.0 + self.momentum)
        return edge / (1.0 + 2.0 * self.momentum) if self.nesterov else edge

    def spectral_radius(self, lam: ArrayLike) -> NDArray[np.float64]:
        """Spectral radius of one linearized step along an eigenvector of the Hessian.

        The block acts on (x, lr m) and follows from torch's update; LAPACK computes its
        eigenvalues. It shares only p with `intervals`, and is an independent check of them. The
        step contracts if the radius is below 1.

        Args:
            lam: finite eigenvalues, any shape.

        Returns:
            float64 of the same shape.

        Raises:
            ValueError: if an entry of the block overflows or `lam` is not finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            step = self.lr * (self.p(lam) + self.weight_decay)  # lr d, for x = 1
        beta = self.momentum
        gain = step * (1.0 - self.dampening) if beta > 0.0 else step  # the addition to lr m
        block = np.empty((*step.shape, 2, 2))
        block[..., 1, 0] = gain  # lr m <- beta lr m + gain x
        block[..., 1, 1] = beta
        if self.nesterov:  # x <- x - lr d - beta (lr m), with the new m
            block[..., 0, 0] = 1.0 - step - beta * gain
            block[..., 0, 1] = -beta * beta
        else:  # x <- x - lr m, with the new m
            block[..., 0, 0] = 1.0 - gain
            block[..., 0, 1] = -beta
        return radius_of(block)


def radius_of(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spectral radii of matrices [..., s, s].

    Raises:
        ValueError: an entry is not finite.
    """
    if not np.isfinite(block).all():
        raise ValueError("spectral_radius needs finite eigenvalues, and no overflowing step")
    return np.asarray(np.abs(np.linalg.eigvals(block)).max(axis=-1), np.float64)


def preimage(coefficients: Sequence[float], low: float, high: float) -> list[Interval]:
    """All real x with low <= p(x) <= high, as disjoint closed intervals, ascending.

    Args:
        coefficients: of p, lowest power first; p is not constant.
        low, high: bounds, low <= high; they may be infinite.
    """
    levels = [level for level in (low, high) if math.isfinite(level)]
    shifted = [(coefficients[0] - level, *coefficients[1:]) for level in levels]
    cuts = sorted({root for poly in shifted for root in real_roots(poly)})
    admitted = [(cut, cut) for cut in cuts]  # p is low or high there
    for interval in pairwise((-math.inf, *cuts, math.inf)):
        if low <= _evaluate(coefficients, inside(*interval)) <= high:
            admitted.append(interval)
    return merge(admitted)


def real_roots(coefficients: Sequence[float]) -> list[float]:
    """The distinct real roots of a polynomial, ascending, to the precision of float64.

    Between two turning points, the roots of the derivative, a polynomial is monotone, so that
    bisection misses no root: neither beside one that is many magnitudes larger, nor a double root,
    which rounding would make complex. Roots beyond the range of float64 are left out.

    Args:
        coefficients: lowest power first; not all zero.
    """
    poly = list(coefficients)
    while poly[-1] == 0.0:
        poly.pop()
    if len(poly) == 1:
        return []
    if poly[0] == 0.0:
        return sorted({0.0, *real_roots(poly[1:])})
    if len(poly) == 2:
        root = -poly[0] / poly[1]
        return [root] if math.isfinite(root) else []
    turning = real_roots([k * c for k, c in enumerate(poly)][1:])
    cauchy = 1.0 + max(abs(c / poly[-1]) for c in poly)  # bounds every root
    bound = min(cauchy, 0.25 * sys.float_info.max)
    roots = [x for x in turning if _sign(poly, x) == 0]
    for left, right in pairwise((-bound, *turning, bound)):
        if _sign(poly, left) * _sign(poly, right) < 0:
            roots.append(_bisect(poly, left, right))
    return sorted(roots)


def _bisect(poly: Sequence[float], left: float, right: float) -> float:
    """The root between two points of opposite sign, down to neighboring floats."""
    rising = _evaluate(poly, right) > 0.0
    while left < (middle := 0.5 * left + 0.5 * right) < right:
        if (_evaluate(poly, middle) > 0.0) == rising:
            right = middle
        else:
            left = middle
    return right


def _evaluate(poly: Sequence[float], x: float) -> float:
    value = 0.0
    for c in reversed(poly):
        value = value * x + c
    return value


def _sign(poly: Sequence[float], x: float) -> int:
    """Sign of the polynomial at x; 0 if the value is within its rounding error."""
    value = _evaluate(poly, x)
    noise = 4.0 * sys.float_info.epsilon * _evaluate([abs(c) for c in poly], abs(x))
    decided = abs(value) > noise or math.isinf(value)
    return int(math.copysign(1.0, value)) if decided else 0


def inside(left: float, right: float) -> float:
    """A point between left and right, either of which may be infinite."""
    if math.isinf(left) and math.isinf(right):
        return 0.0
    if math.isinf(left):
        return right - max(1.0, abs(right))
    if math.isinf(right):
        return left + max(1.0, abs(left))
    return 0.5 * left + 0.5 * right


def merge(intervals: Sequence[Interval]) -> list[Interval]:
    """Join the intervals that overlap or touch."""
    merged: list[Interval] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged
