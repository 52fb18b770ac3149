"""The methods by name: their perturbations, and their optimizers.

A module of this package registers its optimizer with a decorator, and importing the package imports
all of its modules. Whatever lists the methods iterates over these tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from eigenfilter.filters import ASCENTS, METHODS
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.perturbation import Perturbation

OPTIMIZERS: dict[str, Callable[..., EigenfilterOptimizer]] = {}
"""The optimizers: those whose update is SGD's by method, and `updates()`."""

PERTURBATIONS: dict[str, Callable[..., Perturbation]] = {}
"""What makes the perturbation of a method from its options, for the methods that ascend."""

VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {}
"""Names that stand for a method with options."""

_Optimizer = TypeVar("_Optimizer", bound=Callable[..., EigenfilterOptimizer])


def register(
    name: str, perturbation: Callable[..., Perturbation] | None = None, **variants: Any
) -> Callable[[_Optimizer], _Optimizer]:
    """Register the decorated class as the optimizer of a method, or as one of `updates()`.

    Args:
        name: name of the method; the update is SGD's. An optimizer with another update has a name
            that no filter has, and takes `method=` and `rho=`.
        perturbation: makes its perturbation from its options, which are keywords; None if the
            method takes no ascent.
        variants: options of the method by the names that stand for them.

    Raises:
        ValueError: a name is registered already.
    """
    for each in (name, *variants):
        if each in OPTIMIZERS or each in VARIANTS:
            raise ValueError(f"the name {each!r} is registered already: choose another one")

    def decorate(optimizer: _Optimizer) -> _Optimizer:
        OPTIMIZERS[name] = optimizer
        if perturbation is not None:
            PERTURBATIONS[name] = perturbation
        VARIANTS.update({variant: (name, options) for variant, options in variants.items()})
        return optimizer

    return decorate


def names() -> tuple[str, ...]:
    """The methods that ascend, in the order of their filters, each followed by its variants."""
    return tuple(
        name
        for method in ASCENTS
        for name in (method, *(each for each, (of, _) in VARIANTS.items() if of == method))
    )


def updates() -> tuple[str, ...]:
    """The optimizers with another update than SGD's, which take a method as an argument."""
    return tuple(name for name in OPTIMIZERS if name not in METHODS)


def extrapolated() -> tuple[str, ...]:
    """The optimizers that take an `extrapolation`."""
    return tuple(
        name
        for name, make in OPTIMIZERS.items()
        if "extrapolation" in inspect.signature(make).parameters
    )


def method_and_options(name: str) -> tuple[str, Mapping[str, Any]]:
    """The method and the options that one of `names()` stands for."""
    return VARIANTS.get(name, (name, {}))


def perturbation_of(method: str, **options: Any) -> Perturbation:
    """The perturbation of a method.

    Raises:
        ValueError: the method is unknown.
        TypeError: the method has no such option.
    """
    make = PERTURBATIONS.get(method)
    if make is None:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(ASCENTS)}")
    try:
        return make(**options)
    except TypeError as error:
        raise TypeError(f"method {method!r} has no option {', '.join(options)}") from error
