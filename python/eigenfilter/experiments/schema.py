"""Validation of plain data and tensors from a file against a schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenfilter.experiments.errors import quoted


class SchemaError(ValueError):
    """Data from a file do not match their schema; the message says where."""


@dataclass(frozen=True)
class Nullable:
    """A schema that matches None and whatever `schema` matches."""

    schema: Any


@dataclass(frozen=True)
class ListOf:
    """A schema of lists of any length whose values match `schema`."""

    schema: Any


@dataclass(frozen=True)
class HasEntries:
    """A schema of dictionaries that have these entries, and possibly others."""

    entries: dict[str, Any]


def validate(value: Any, schema: Any, where: str) -> None:
    """Check a value against a schema.

    A schema is one of these:

    - a type, for values of exactly this type; a float must also be finite;
    - a tensor, for tensors of its shape and dtype;
    - a dictionary, for dictionaries with the same keys, whose values match its values;
    - a list or tuple, for sequences of the same type and length, likewise;
    - `Nullable`, `ListOf` or `HasEntries`;
    - any other value, for itself; a float is compared up to rounding.

    Args:
        value: the data.
        schema: the schema.
        where: what the value is, for the message.

    Raises:
        SchemaError: the value does not match.
    """
    if isinstance(schema, Nullable):
        if value is not None:
            validate(value, schema.schema, where)
    elif isinstance(schema, ListOf):
        _validate_type(value, list, where)
        _validate_sequence(value, [schema.schema] * len(value), where)
    elif isinstance(schema, HasEntries):
        _validate_entries(value, schema.entries, where)
    elif isinstance(schema, type):
        _validate_type(value, schema, where)
    elif isinstance(schema, Tensor):
        _validate_tensor(value, schema, where)
    elif isinstance(schema, dict):
        _validate_entries(value, schema, where)
        for key in value:
            if key not in schema:
                raise SchemaError(
                    f"{where} has an entry {quoted(key)}, which does not belong there"
                )
    elif isinstance(schema, (list, tuple)):
        _validate_type(value, type(schema), where)
        _validate_sequence(value, schema, where)
    else:
        _validate_value(value, schema, where)


def _validate_type(value: Any, schema: type, where: str) -> None:
    if schema is dict and isinstance(value, dict):
        return
    if type(value) is not schema:
        raise SchemaError(f"{where} is a {type(value).__name__}, not a {schema.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"{where} is {value}")


def _validate_tensor(value: Any, schema: Tensor, where: str) -> None:
    _validate_type(value, Tensor, where)
    for name in ("dtype", "shape"):
        actual, expected = getattr(value, name), getattr(schema, name)
        if actual != expected:
            word = "size" if name == "shape" else name
            raise SchemaError(
                f"{word} mismatch for {where}: {_format(actual)}, not {_format(expected)}"
            )


def _format(value: Any) -> object:
    return list(value) if isinstance(value, torch.Size) else value


def _validate_entries(value: Any, entries: dict[Any, Any], where: str) -> None:
    _validate_type(value, dict, where)
    for key, schema in entries.items():
        if key not in value:
            raise SchemaError(f"{where} has no entry {key!r}")
        validate(value[key], schema, f"{key} of {where}")


def _validate_sequence(value: Any, schemas: Sequence[Any], where: str) -> None:
    if len(value) != len(schemas):
        raise SchemaError(f"{where} has {len(value)} values, not {len(schemas)}")
    for i, (item, schema) in enumerate(zip(value, schemas, strict=True)):
        validate(item, schema, f"value {i} of {where}")


def _validate_value(value: Any, expected: Any, where: str) -> None:
    _validate_type(value, type(expected), where)
    if type(expected) is float:
        same = math.isclose(value, expected, rel_tol=1e-12)
    else:
        same = value == expected
    if not same:
        raise SchemaError(f"{where} is {quoted(value)}, not {expected!r}")
