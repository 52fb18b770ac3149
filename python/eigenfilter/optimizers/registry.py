"""The methods by name: their perturbations, and the optimizers whose update is SGD's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.hessian_usam import HessianUSAM, hessian_usam_perturbation
from eigenfilter.optimizers.perturbation import Perturbation
from eigenfilter.optimizers.sam import SAM, SAMPerturbation
from eigenfilter.optimizers.sgd import SGD
from eigenfilter.optimizers.two_step_usam import TwoStepUSAM, TwoStepUSAMPerturbation
from eigenfilter.optimizers.usam import USAM, USAMPerturbation

METHODS: Mapping[str, Callable[..., Perturbation]] = {
    USAM.method: USAMPerturbation,
    SAM.method: SAMPerturbation,
    TwoStepUSAM.method: TwoStepUSAMPerturbation,
    HessianUSAM.method: hessian_usam_perturbation,
}

OPTIMIZERS: Mapping[str, Callable[..., EigenfilterOptimizer]] = {
    cls.method: cls for cls in (SGD, USAM, SAM, TwoStepUSAM, HessianUSAM)
}

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {"asam": (SAM.method, {"adaptive": True})}
"""Names that stand for a method with options."""

NAMES = tuple(
    name
    for method in METHODS
    for name in (method, *(each for each, (of, _) in VARIANTS.items() if of == method))
)
"""The methods, each followed by its variants."""


def method_and_options(name: str) -> tuple[str, Mapping[str, Any]]:
    """The method and the options that one of `NAMES` stands for."""
    return VARIANTS.get(name, (name, {}))


def perturbation_of(method: str, **options: Any) -> Perturbation:
    """The ascent of a method.

    Raises:
        ValueError: the method is unknown.
        TypeError: the method has no such option.
    """
    make = METHODS.get(method)
    if make is None:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    try:
        return make(**options)
    except TypeError as error:
        raise TypeError(f"method {method!r} has no option {', '.join(options)}") from error
