"""Whether plain data and tensors from a file have the structure that they must have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenfilter.experiments.errors import quoted


class SchemaError(ValueError):
    """Something in a file is not what it must be; the message has where."""


@dataclass(frozen=True)
class Nullable:
    """What fits `wanted`, or None."""

    wanted: Any


@dataclass(frozen=True)
class ListOf:
    """A list of any length whose values fit `wanted`."""

    wanted: Any


@dataclass(frozen=True)
class AtLeast:
    """A dictionary that has these entries, and others, which are not looked at."""

    wanted: dict[str, Any]


def validate(found: Any, wanted: Any, at: str) -> None:
    """Check what was found against a pattern.

    Args:
        found: data.
        wanted: a type, for a value of exactly this type, a finite one if it is float; a tensor,
            for one of its shape and dtype; a dictionary, for one with its keys and values that fit
            its values; a list or tuple, for one of its length, likewise; `Nullable`, `ListOf`, `AtLeast`;
            any other value, for itself, a number of floating point up to rounding.
        at: where it was found, for the message.

    Raises:
        Misfit: it does not fit.
    """
    if isinstance(wanted, Nullable):
        if found is not None:
            validate(found, wanted.wanted, at)
    elif isinstance(wanted, ListOf):
        _validate_type(found, list, at)
        _validate_sequence(found, [wanted.wanted] * len(found), at)
    elif isinstance(wanted, AtLeast):
        _validate_entries(found, wanted.wanted, at)
    elif isinstance(wanted, type):
        _validate_type(found, wanted, at)
    elif isinstance(wanted, Tensor):
        _validate_tensor(found, wanted, at)
    elif isinstance(wanted, dict):
        _validate_entries(found, wanted, at)
        for key in found:
            if key not in wanted:
                raise SchemaError(f"{at} has an entry {quoted(key)}, which does not belong there")
    elif isinstance(wanted, (list, tuple)):
        _validate_type(found, type(wanted), at)
        _validate_sequence(found, wanted, at)
    else:
        _validate_value(found, wanted, at)


def _validate_type(found: Any, wanted: type, at: str) -> None:
    if wanted is dict and isinstance(found, dict):
        return
    if type(found) is not wanted:
        raise SchemaError(f"{at} is a {type(found).__name__}, not a {wanted.__name__}")
    if isinstance(found, float) and not math.isfinite(found):
        raise SchemaError(f"{at} is {found}")


def _validate_tensor(found: Any, wanted: Tensor, at: str) -> None:
    _validate_type(found, Tensor, at)
    for name in ("dtype", "shape"):
        there, here = getattr(found, name), getattr(wanted, name)
        if there != here:
            word = "size" if name == "shape" else name
            raise SchemaError(f"{word} mismatch for {at}: {_shown(there)}, not {_shown(here)}")


def _shown(value: Any) -> object:
    return list(value) if isinstance(value, torch.Size) else value


def _validate_entries(found: Any, wanted: dict[Any, Any], at: str) -> None:
    _validate_type(found, dict, at)
    for key, value in wanted.items():
        if key not in found:
            raise SchemaError(f"{at} has no entry {key!r}")
        validate(found[key], value, f"{key} of {at}")


def _validate_sequence(found: Any, wanted: Sequence[Any], at: str) -> None:
    if len(found) != len(wanted):
        raise SchemaError(f"{at} has {len(found)} values, not {len(wanted)}")
    for i, (there, here) in enumerate(zip(found, wanted, strict=True)):
        validate(there, here, f"value {i} of {at}")


def _validate_value(found: Any, wanted: Any, at: str) -> None:
    _validate_type(found, type(wanted), at)
    same = math.isclose(found, wanted, rel_tol=1e-12) if type(wanted) is float else found == wanted
    if not same:
        raise SchemaError(f"{at} is {quoted(found)}, not {wanted!r}")
