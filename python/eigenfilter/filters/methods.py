"""One class for each method, which carries the method's theory.

A method with ascents states its name, its gradients a step, and p by its `Terms`; the
filter, the design of rho, the certificate and the command line follow from these.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eigenfilter.filters.stability import PolynomialFilter, check_field, radius_of


def common(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group that every filter of SGD's update has."""
    names = ("lr", "momentum", "dampening", "weight_decay", "maximize")
    return {name: group[name] for name in names}


class Terms(NamedTuple):
    """p of a method with ascents: p(lambda) = lambda (1 + a s + b s^2) with s = r lambda^power.

    The radius r is rho, or rho / G for a method that normalizes the gradient, whose norm is G.
    """

    a: float
    b: float = 0.0
    power: int = 1


@dataclass(frozen=True)
class AscentFilter(PolynomialFilter):
    """The filter of a method that takes ascents before the gradient of its descent.

    With rho = 0 it is heavy ball's (Nesterov's with `nesterov`).

    Args:
        rho: step size of the ascents, at least 0. The others are those of `PolynomialFilter`.
        nesterov: whether the momentum is Nesterov's instead of heavy ball.

    Attributes:
        forms: values of the argument `ascent`, if the method has several forms.

    Raises:
        ValueError: a value is outside its range.
    """

    forms: ClassVar[tuple[str, ...]] = ()

    _: KW_ONLY
    rho: float
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "rho", 0.0, math.inf)

    @classmethod
    def of_group(cls, group: Mapping[str, Any], **options: Any) -> PolynomialFilter:
        if float(group["rho"]) == 0.0:
            return HeavyBall.of_group(group)
        if group.get("extrapolation"):
            raise TypeError("no filter is known for an ascent from an extrapolated point")
        own = {"rho": group["rho"], "nesterov": group["nesterov"]}
        return cls(**common(group), **own, **options)

    @property
    @abstractmethod
    def terms(self) -> Terms:
        """The terms of p."""

    @property
    def radius(self) -> float:
        """The radius r."""
        return self.rho

    @property
    def ascending_coefficients(self) -> tuple[float, ...]:
        a, b, power = self.terms
        coefficients = [0.0, 1.0, *[0.0] * (power - 1), a * self.radius]
        if b:
            coefficients += [*[0.0] * (power - 1), b * self.radius * self.radius]
        return tuple(coefficients)


METHODS: dict[str, type[PolynomialFilter]] = {}
"""All methods with SGD's update, by name."""

ASCENTS: dict[str, type[AscentFilter]] = {}
"""The methods that take ascents, by name."""

_Filter = TypeVar("_Filter", bound="type[PolynomialFilter]")


def register(cls: _Filter) -> _Filter:
    """Register the decorated class as the filter of its method.

    Raises:
        ValueError: a filter of that name is registered already.
    """
    if cls.method in METHODS:
        raise ValueError(f"the name {cls.method!r} is registered already: choose another one")
    METHODS[cls.method] = cls
    if issubclass(cls, AscentFilter):
        ASCENTS[cls.method] = cls
    return cls


@register
@dataclass(frozen=True)
class HeavyBall(PolynomialFilter):
    """Gradient descent and heavy ball, also with extrapolated momentum: p(lambda) = lambda.

    Without extrapolation it admits the single interval -wd <= lambda <= 2 (1 + momentum) / (lr (1 -
    dampening)) - wd, with the dampening only where momentum > 0. With extrapolation e the gradient
    is taken at y = x - e m, m being the momentum buffer. The determinant of an eigenvalue's block
    is momentum - e q, where q = (1 - dampening) (lambda + wd), so that Jury's conditions are

        0 <= q,    (lr + 2 e) q <= 2 (1 + momentum),    -1 <= momentum - e q <= 1

    For e > 0 the second decides, and one gradient a step puts the edge anywhere below heavy ball's.
    e = lr momentum has Nesterov's edge. For e < 0, which looks back along m, the edge may be (1 -
    momentum) / -e, which complex multipliers cross. Exact for every weight decay wd.

    Args:
        extrapolation: distance e that the gradient's point lies ahead, in units of the buffer. If
            it is not 0, momentum > 0. The others are those of `PolynomialFilter`.

    Raises:
        ValueError: a value is outside its range.

    Source: arXiv 2510.09034; the extrapolated form: M. Becker et al., 2024, arXiv 2401.12033, is
    this with m normalized; the edge is ours.

    >>> HeavyBall(lr=0.1, momentum=0.5).max_eigenvalue()
    30.0
    >>> round(HeavyBall(lr=0.1, momentum=0.5, extrapolation=0.1).max_eigenvalue(), 9)
    10.0
    """

    method = "sgd"
    title = "SGD"

    extrapolation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "extrapolation", -math.inf, math.inf)
        if self.extrapolation != 0.0 and (self.momentum == 0.0 or self.nesterov):
            raise ValueError(
                "extrapolation follows the buffer of heavy ball: set momentum > 0, and no nesterov"
            )

    @classmethod
    def of_group(cls, group: Mapping[str, Any], **options: Any) -> PolynomialFilter:
        if group["nesterov"]:
            return Nesterov(**common(group))
        return HeavyBall(**common(group), extrapolation=group.get("extrapolation", 0.0))

    @property
    def ascending_coefficients(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    @property
    def _gain(self) -> float:
        return super()._gain if self.extrapolation == 0.0 else 1.0 - self.dampening

    @property
    def _edge(self) -> float:
        e, beta = self.extrapolation, self.momentum
        if e == 0.0:
            return super()._edge
        reach = self.lr + 2.0 * e
        real = 2.0 * (1.0 + beta) / reach if reach > 0.0 else math.inf
        return min(real, (1.0 - beta) / -e) if e < 0.0 else real

    @property
    def composes(self) -> bool:
        e, lr = self.extrapolation, self.lr
        return e == 0.0 or (lr > 0.0 and -4.0 * e <= (1.0 - self.momentum) * lr)

    def spectral_radius(self, lam: ArrayLike) -> NDArray[np.float64]:
        """See `PolynomialFilter`; with extrapolation the block acts on (x, a multiple of m)."""
        e, beta = self.extrapolation, self.momentum
        if e == 0.0:
            return super().spectral_radius(lam)
        with np.errstate(over="ignore", invalid="ignore"):
            q = (1.0 - self.dampening) * (self.p(lam) + self.weight_decay)
        scale = max(self.lr, abs(e))
        block = np.empty((*q.shape, 2, 2))
        block[..., 1, 0] = scale * q  # m <- beta m + q y, for y = x - e m
        block[..., 1, 1] = beta - e * q
        block[..., 0, 0] = 1.0 - self.lr * q  # x <- x - lr m, with the new m
        block[..., 0, 1] = -self.lr / scale * (beta - e * q)
        return radius_of(block)


@register
@dataclass(frozen=True)
class MSAM(HeavyBall):
    """Momentum-SAM: `HeavyBall` with the extrapolation rho / G, where G is the momentum's norm.

    The gradient and the decay are taken at y = x - rho m / |m|. For a fixed G = |m| the admitted
    set is

        0 <= (lr + 2 rho / G) (1 - dampening) (lambda + wd) <= 2 (1 + momentum)

    It shrinks as G does: as SAM's it holds for the present G, and is not one about a limit. At the
    edge, where x jumps from side to side, G is |grad f(y)| / (1 + momentum).

    Args:
        rho: distance of the gradient's point, at least 0. If it is not 0, momentum > 0. The others
            are those of `PolynomialFilter`.
        momentum_norm: norm G of the momentum buffers, greater than 0.

    Raises:
        ValueError: a value is outside its range.

    Source: M. Becker et al., 2024, arXiv 2401.12033; the edge is ours.

    >>> round(MSAM(lr=0.1, momentum=0.5, rho=0.2, momentum_norm=2.0).max_eigenvalue(), 9)
    10.0
    """

    method = "msam"
    title = "MSAM"

    extrapolation: float = field(init=False, default=0.0)
    _: KW_ONLY
    rho: float
    momentum_norm: float

    def __post_init__(self) -> None:
        check_field(self, "rho", 0.0, math.inf)
        check_field(self, "momentum_norm", sys.float_info.min, math.inf)
        object.__setattr__(self, "extrapolation", self.rho / self.momentum_norm)
        super().__post_init__()

    @classmethod
    def of_group(cls, group: Mapping[str, Any], **options: Any) -> PolynomialFilter:
        rho, norm = float(group["rho"]), float(group["momentum_norm"])
        if rho == 0.0:
            return HeavyBall(**common(group))
        if norm == 0.0:
            raise TypeError(
                "MSAM has no filter while its momentum is 0, as before its first step, because its "
                "edge moves with the norm: take steps, or use filters.MSAM(..., momentum_norm=norm)"
            )
        return cls(**common(group), rho=rho, momentum_norm=norm)


@dataclass(frozen=True)
class Nesterov(HeavyBall):
    """Nesterov momentum in torch's form: x <- x - lr (d + momentum m), p(lambda) = lambda.

    Admits -wd <= lambda <= (2 + 2 momentum) / (lr (1 + 2 momentum)) - wd. Exact for every weight
    decay wd. Needs momentum > 0 and dampening = 0, as torch does; otherwise arguments and errors
    are those of `PolynomialFilter`. Source: arXiv 2510.09034.

    >>> Nesterov(lr=0.1, momentum=0.5).max_eigenvalue()
    15.0
    """

    nesterov: bool = field(default=True, init=False, repr=False)


@register
@dataclass(frozen=True)
class USAM(AscentFilter):
    """Unnormalized SAM: d(x) = grad f(x + rho grad f(x)), p(lambda) = lambda (1 + rho lambda).

    Since p is a parabola, the admitted set has two intervals at weight decay 0: one from 0 to the
    edge, which lies below that of the same method without rho, and its mirror image about
    -1 / (2 rho): saddles with negative eigenvalues at and below -1 / rho. Weight decay widens both
    until they meet, at 1 / (4 rho). With weight decay the equilibrium has a nonzero gradient and
    the statement holds up to a term of first order in it. With rho = 0 this is heavy ball
    (Nesterov with `nesterov`). Source: arXiv 2510.09034.

    Args:
        rho: step size of the ascent, at least 0. The others are those of `PolynomialFilter`.
        nesterov: whether the momentum is Nesterov's instead of heavy ball.

    Raises:
        ValueError: a value is outside its range.

    >>> [(round(low, 3), round(high, 3)) for low, high in USAM(lr=0.2, rho=0.05).intervals()]
    [(-27.321, -20.0), (0.0, 7.321)]
    """

    method = "usam"
    title = "USAM"
    gradients = 2

    @property
    def terms(self) -> Terms:
        return Terms(1.0)


@register
@dataclass(frozen=True)
class SAM(USAM):
    """Normalized SAM where the gradient's norm is G: p(lambda) = lambda (1 + rho lambda / G).

    d(x) = grad f(x + rho g / ||g||) is not differentiable at an equilibrium: SAM has no filter.
    With a constant G it is USAM with radius rho / G, and its edge changes with G. The statement
    holds for the present G, and is not one about a limit. Source: our reading.

    Args:
        rho: length of the ascent, at least 0. The others are those of `PolynomialFilter`.
        grad_norm: gradient norm G, greater than 0.
        nesterov: whether the momentum is Nesterov's instead of heavy ball.

    Raises:
        ValueError: a value is outside its range.

    >>> SAM(0.2, rho=0.1, grad_norm=2.0).intervals() == USAM(0.2, rho=0.05).intervals()
    True
    """

    method = "sam"
    title = "SAM"

    _: KW_ONLY
    grad_norm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "grad_norm", sys.float_info.min, math.inf)

    @property
    def radius(self) -> float:
        return self.rho / self.grad_norm


@register
@dataclass(frozen=True)
class TwoStepUSAM(AscentFilter):
    """Two-step USAM, with two ascents before the gradient.

    "sequential": p(lambda) = lambda (1 + rho lambda)^2, "anchored": p(lambda) = lambda (1 + rho
    lambda + rho^2 lambda^2). At weight decay 0 the admitted set is one interval from 0 to the edge
    and, sequentially, the single point -1 / rho. With weight decay the statement holds up
    to a term of first order in it. With rho = 0 this is heavy ball (Nesterov with `nesterov`).
    Source: arXiv 2510.09034; the method's exact form is our reading.

    Args:
        rho: step size of both ascents, at least 0. The others are those of `PolynomialFilter`.
        ascent: "sequential" or "anchored".
        nesterov: whether the momentum is Nesterov's instead of heavy ball.

    Raises:
        ValueError: a value is outside its range.

    >>> round(TwoStepUSAM(lr=0.1, rho=0.02).max_eigenvalue(), 2)
    12.71
    """

    method = "two_step_usam"
    title = "two-step USAM"
    gradients = 3
    forms = ("sequential", "anchored")

    _: KW_ONLY
    ascent: str = "sequential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ascent not in self.forms:
            raise ValueError(f'ascent must be "sequential" or "anchored", got {self.ascent!r}')

    @property
    def terms(self) -> Terms:
        return Terms(2.0 if self.ascent == "sequential" else 1.0, 1.0)


@register
@dataclass(frozen=True)
class HessianUSAM(AscentFilter):
    """Hessian USAM: d(x) = grad f(x + rho H grad f(x)), p(lambda) = lambda (1 + rho lambda^2).

    p is odd and increasing: at weight decay 0 the admitted set is one interval from 0 to the edge,
    and no negative eigenvalue is in it. With weight decay the statement holds up to a term of
    first order in it. With rho = 0 this is heavy ball (Nesterov with `nesterov`). Source: arXiv
    2510.09034; the method's exact form is our reading.

    Args:
        rho: step size of the ascent, at least 0. The others are those of `PolynomialFilter`.
        nesterov: whether the momentum is Nesterov's instead of heavy ball.

    Raises:
        ValueError: a value is outside its range.

    >>> round(HessianUSAM(lr=0.1, rho=0.003).max_eigenvalue(), 2)
    13.16
    """

    method = "hessian_usam"
    title = "Hessian USAM"
    gradients = 3

    @property
    def terms(self) -> Terms:
        return Terms(1.0, power=2)
