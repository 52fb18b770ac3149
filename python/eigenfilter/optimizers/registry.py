"""The methods by name: their perturbations, and their optimizers.

A module of this package registers its optimizer with a decorator, and importing the package imports
all of its modules. Whatever lists the methods iterates over these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from eigenfilter.filters import ASCENTS
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.perturbation import Perturbation

OPTIMIZERS: dict[str, Callable[..., EigenfilterOptimizer]] = {}
"""The optimizers whose update is SGD's, by method."""

UPDATES: dict[str, Callable[..., EigenfilterOptimizer]] = {}
"""The optimizers with another update, which take a method as an argument, by name."""

METHODS: dict[str, Callable[..., Perturbation]] = {}
"""What makes the perturbation of a method from its options, for the methods that ascend."""

VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {}
"""Names that stand for a method with options."""

_Optimizer = TypeVar("_Optimizer", bound=Callable[..., EigenfilterOptimizer])


def register(
    method: str, perturbation: Callable[..., Perturbation] | None = None, **variants: Any
) -> Callable[[_Optimizer], _Optimizer]:
    """Register the decorated class, whose update is SGD's, as the optimizer of a method.

    Args:
        method: name of the method.
        perturbation: makes its perturbation from its options, which are keywords; None if the
            method takes no ascent.
        variants: options of the method by the names that stand for them.
    """

    def decorate(optimizer: _Optimizer) -> _Optimizer:
        OPTIMIZERS[method] = optimizer
        if perturbation is not None:
            METHODS[method] = perturbation
        VARIANTS.update({name: (method, options) for name, options in variants.items()})
        return optimizer

    return decorate


def register_update(name: str) -> Callable[[_Optimizer], _Optimizer]:
    """Register the decorated class, which takes `method=` and `rho=`, under its name."""

    def decorate(optimizer: _Optimizer) -> _Optimizer:
        UPDATES[name] = optimizer
        return optimizer

    return decorate


def names() -> tuple[str, ...]:
    """The methods that ascend, in the order of their filters, each followed by its variants."""
    return tuple(
        name
        for method in ASCENTS
        for name in (method, *(each for each, (of, _) in VARIANTS.items() if of == method))
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
    make = METHODS.get(method)
    if make is None:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(ASCENTS)}")
    try:
        return make(**options)
    except TypeError as error:
        raise TypeError(f"method {method!r} has no option {', '.join(options)}") from error
