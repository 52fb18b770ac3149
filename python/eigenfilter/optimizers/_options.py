"""Arguments of torch's optimizers that a fused step accepts or refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict


class Options(TypedDict, total=False):
    """Further keyword arguments of every optimizer.

    Attributes:
        set_to_none: whether an ascent sets the gradients to None, as `zero_grad` does. With False
            it keeps the tensors and fills them with 0, for programs whose gradients are views of
            one buffer.
        fused, foreach: accepted and ignored, because every step is fused.
        capturable: accepted and ignored, because CUDA graphs can capture every step.
        differentiable, amsgrad: only False is accepted.
    """

    set_to_none: bool
    fused: bool | None
    foreach: bool | None
    capturable: bool
    differentiable: bool
    amsgrad: bool


_REFUSED = {
    "amsgrad": "amsgrad=True is not supported: use torch.optim.AdamW(amsgrad=True), inside "
    "eigenfilter.SharpnessAware for an ascent",
    "differentiable": "differentiable=True is not supported, a fused step has no derivative: use "
    "the torch optimizer to differentiate through a step",
}
_KNOWN = tuple(Options.__annotations__)


def check_options(options: Mapping[str, Any], owner: str) -> bool:
    """Check further arguments of a constructor and return the value of `set_to_none`.

    Raises:
        TypeError: no optimizer has the argument, or it is not a bool.
        ValueError: the argument asks for a mode that a fused step does not have.
    """
    for name, value in options.items():
        if name not in _KNOWN:
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}")
        if not isinstance(value, bool) and not (value is None and name in ("fused", "foreach")):
            raise TypeError(f"{name} must be True or False, and is {value!r}")
    refuse_modes(options)
    set_to_none: bool = options.get("set_to_none", True)
    return set_to_none


def refuse_modes(group: Mapping[str, Any]) -> None:
    """Raise ValueError for options that ask for a mode that a fused step does not have."""
    for name, message in _REFUSED.items():
        if group.get(name):
            raise ValueError(message)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split into the options that every optimizer has, and the others."""
    own = {name: value for name, value in options.items() if name in _KNOWN}
    return own, {name: value for name, value in options.items() if name not in _KNOWN}
