"""Marks of tests by their cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rest_slow(values: Iterable[Any], essential: int = 1) -> list[Any]:
    """Return parameters of which `make test` runs the first ones, and `make test-all` the others.

    Args:
        values: values of one parameter.
        essential: how many of them `make test` runs.
    """
    marks = pytest.mark.slow
    return [v if i < essential else pytest.param(v, marks=marks) for i, v in enumerate(values)]
