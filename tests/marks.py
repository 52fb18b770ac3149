"""Marks of tests by their cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rest_slow(values: Iterable[Any], *essential: Any) -> list[Any]:
    """Return parameters of which `make test` runs some, and `make test-all` the others.

    Args:
        values: values of one parameter.
        essential: those that `make test` runs; by default the first value.
    """
    every = list(values)
    chosen = essential or every[:1]
    assert all(value in every for value in chosen), f"{chosen} are not all among {every}"
    slow = pytest.mark.slow
    return [v if v in chosen else pytest.param(v, marks=slow) for v in every]
