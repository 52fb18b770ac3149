"""docs/theory.md names functions and tests that exist."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "theory.md"
NAMES = sorted(set(re.findall(r"`([^`\n]+)`", PAGE.read_text())))
FUNCTIONS = [name for name in NAMES if name.startswith("eigenfilter.")]
TESTS = [name for name in NAMES if name.startswith("tests/")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_the_page_names_exists(name: str) -> None:
    words = name.split(".")
    for cut in range(len(words), 0, -1):
        try:
            found = import_module(".".join(words[:cut]))
        except ModuleNotFoundError:
            continue
        for word in words[cut:]:
            found = getattr(found, word)
        assert callable(found)
        return
    raise AssertionError(f"{name}: no such module")


@pytest.mark.parametrize("name", TESTS)
def test_a_test_that_the_page_names_exists(name: str) -> None:
    path, function = name.split("::")
    body = ast.parse((ROOT / path).read_text()).body
    assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_filter_is_on_the_page() -> None:
    filters = import_module("eigenfilter.filters")
    kinds = {
        f"eigenfilter.filters.{name}"
        for name in filters.__all__
        if isinstance(getattr(filters, name), type) and name != "Filter"
    }
    missing = {name for name in kinds if not any(named.startswith(name) for named in FUNCTIONS)}
    assert not missing


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
