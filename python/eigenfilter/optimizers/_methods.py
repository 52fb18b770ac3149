"""The ascents by name, for the optimizers that have a `method` argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eigenfilter.optimizers._ascents import Ascent
from eigenfilter.optimizers.hessian_usam import hessian_usam_ascent
from eigenfilter.optimizers.sam import SAMAscent
from eigenfilter.optimizers.two_step_usam import TwoStepUSAMAscent
from eigenfilter.optimizers.usam import USAMAscent

METHODS: Mapping[str, Callable[..., Ascent]] = {
    "usam": USAMAscent,
    "sam": SAMAscent,
    "two_step_usam": TwoStepUSAMAscent,
    "hessian_usam": hessian_usam_ascent,
}


def ascent_of(method: str, **options: Any) -> Ascent:
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
