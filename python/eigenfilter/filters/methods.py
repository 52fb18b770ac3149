"""One class for each method, and the filters of a live optimizer.

A method defines its polynomial p; `PolynomialFilter` derives the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Protocol

from eigenfilter.filters.adamw import AdamW
from eigenfilter.filters.stability import Filter, PolynomialFilter, check_field


@dataclass(frozen=True)
class HeavyBall(PolynomialFilter):
    """Gradient descent and heavy ball: d(x) = grad f(x), p(lambda) = lambda.

    Admits the single interval -wd <= lambda <= 2 (1 + momentum) / (lr (1 - dampening)) - wd, with
    the dampening only where momentum > 0. Exact for every weight decay wd. Arguments and errors
    are those of `PolynomialFilter`. Source: arXiv 2510.09034.

    >>> HeavyBall(lr=0.1, momentum=0.5).max_eigenvalue()
    30.0
    """

    @property
    def ascending_coefficients(self) -> tuple[float, ...]:
        return (0.0, 1.0)


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


@dataclass(frozen=True)
class USAM(PolynomialFilter):
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

    _: KW_ONLY
    rho: float
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "rho", 0.0, math.inf)

    @property
    def ascending_coefficients(self) -> tuple[float, ...]:
        return (0.0, 1.0, self.rho)


@dataclass(frozen=True)
class TwoStepUSAM(PolynomialFilter):
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

    _: KW_ONLY
    rho: float
    ascent: str = "sequential"
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "rho", 0.0, math.inf)
        if self.ascent not in ("sequential", "anchored"):
            raise ValueError(f'ascent must be "sequential" or "anchored", got {self.ascent!r}')

    @property
    def ascending_coefficients(self) -> tuple[float, ...]:
        middle = 2.0 if self.ascent == "sequential" else 1.0
        return (0.0, 1.0, middle * self.rho, self.rho * self.rho)


@dataclass(frozen=True)
class HessianUSAM(PolynomialFilter):
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

    _: KW_ONLY
    rho: float
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "rho", 0.0, math.inf)

    @property
    def ascending_coefficients(self) -> tuple[float, ...]:
        return (0.0, 1.0, 0.0, self.rho)


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

    _: KW_ONLY
    grad_norm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "grad_norm", sys.float_info.min, math.inf)

    @property
    def ascending_coefficients(self) -> tuple[float, ...]:
        return (0.0, 1.0, self.rho / self.grad_norm)


class _Optimizer(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def of(opt: _Optimizer, *, grad_norm: float | None = None) -> list[Filter]:
    """The filters of a live optimizer at its present hyperparameters, one per param group.

    Each is the filter of its group trained alone. If several groups differ, the filter of the whole
    model composes them and is not their union. A group with rho = 0 is heavy ball or Nesterov. The
    filter of a group with `maximize` is in eigenvalues of f, which are those of -f negated.

    Args:
        opt: an optimizer of eigenfilter, torch.optim.SGD, AdamW, or Adam without decay, or
            `SharpnessAware` around one of torch's. AdamW's filters concern the preconditioned
            Hessian, with its ascent if it takes one: see `AdamW`.
        grad_norm: gradient norm for which SAM's edge is computed, greater than 0; see `SAM`.

    Raises:
        TypeError: the optimizer has no known filter, as ASAM, or is SAM without grad_norm.
        ValueError: a group holds a value outside its range.
    """
    method = _method(opt)
    if method == "adamw":
        return [_adamw(group) for group in opt.param_groups]
    if method == "sam":
        return _sam(opt, grad_norm)
    build = _BUILDERS.get(method)
    if build is None:
        known = ", ".join(map(repr, sorted(_BUILDERS)))
        inner = type(getattr(opt, "base_optimizer", None))
        around = "" if inner is type(None) else f" around {inner.__name__}"
        raise TypeError(
            f"no filter is known for {type(opt).__name__}{around}; supported are torch.optim's "
            "SGD, AdamW and Adam without decay, SharpnessAware around these, and eigenfilter's "
            f"optimizers with method 'sam', {known}"
        )
    return [build(group, opt) for group in opt.param_groups]


def _method(opt: _Optimizer) -> str:
    """Name of the method, or "" if unknown.

    The class states it. A `SharpnessAware` around torch's SGD has the name of its ascent.
    """
    for cls in type(opt).__mro__:
        known = _BY_CLASS.get((cls.__module__, cls.__name__))
        if known == "wrapper":
            base = _method(opt.base_optimizer)  # type: ignore[attr-defined]
            ascent: str = opt.method  # type: ignore[attr-defined]
            return {"sgd": ascent, "adamw": "adamw"}.get(base, "")
        if known is not None:
            return known
    method = getattr(type(opt), "method", "")
    return method if method == "sam" or method in _BUILDERS else ""


def _adamw(group: Mapping[str, Any]) -> Filter:
    if group.get("amsgrad"):
        raise TypeError("no filter is known for AMSGrad, whose preconditioner differs")
    if float(group["weight_decay"]) != 0.0 and not group.get("decoupled_weight_decay", True):
        raise TypeError("no filter is known for Adam whose gradient has the decay: use AdamW")
    names = ("lr", "weight_decay", "maximize")
    return AdamW(beta1=group["betas"][0], **{name: group[name] for name in names})


def _sam(opt: _Optimizer, grad_norm: float | None) -> list[Filter]:
    if getattr(opt, "adaptive", False):
        raise TypeError("no filter is known for ASAM, whose ascent is scaled by the parameters")
    if grad_norm is None:
        raise TypeError(
            "SAM has no filter without a gradient norm, with which its edge moves: give grad_norm, "
            "or use filters.SAM(lr, ..., rho=rho, grad_norm=norm)"
        )
    build = _ascending(partial(SAM, grad_norm=grad_norm))
    return [build(group, opt) for group in opt.param_groups]


def _common(group: Mapping[str, Any]) -> dict[str, Any]:
    names = ("lr", "momentum", "dampening", "weight_decay", "maximize")
    return {name: group[name] for name in names}


def _sgd(group: Mapping[str, Any], opt: _Optimizer) -> Filter:
    return Nesterov(**_common(group)) if group["nesterov"] else HeavyBall(**_common(group))


def _ascending(
    build: Callable[..., Filter], *attributes: str
) -> Callable[[Mapping[str, Any], _Optimizer], Filter]:
    """A function that builds the filter of a method with rho from a group and its optimizer."""

    def build_one(group: Mapping[str, Any], opt: _Optimizer) -> Filter:
        if float(group["rho"]) == 0.0:
            return _sgd(group, opt)
        more = {name: getattr(opt, name) for name in attributes}
        return build(**_common(group), rho=group["rho"], nesterov=group["nesterov"], **more)

    return build_one


_BY_CLASS: Mapping[tuple[str, str], str] = {
    ("torch.optim.sgd", "SGD"): "sgd",
    ("torch.optim.adam", "Adam"): "adamw",
    ("torch.optim.adamw", "AdamW"): "adamw",
    ("eigenfilter.optimizers.adamw", "AdamW"): "adamw",
    ("eigenfilter.optimizers.wrapper", "SharpnessAware"): "wrapper",
}

_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], _Optimizer], Filter]] = {
    "sgd": _sgd,
    "usam": _ascending(USAM),
    "two_step_usam": _ascending(TwoStepUSAM, "ascent"),
    "hessian_usam": _ascending(HessianUSAM),
}
