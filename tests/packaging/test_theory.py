"""docs/theory.md names functions and tests that exist, and its formulas are the filters'."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from eigenfilter import filters

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "theory.md"
NAMES = sorted(set(re.findall(r"`([^`\n]+)`", PAGE.read_text())))
FUNCTIONS = [name for name in NAMES if name.startswith("eigenfilter.")]
TESTS = [name for name in NAMES if name.startswith("tests/")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_the_page_names_exists(name: str) -> None:
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            target = import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            target = getattr(target, word)
        assert callable(target)
        return
    raise AssertionError(f"{name}: no such module")


@pytest.mark.parametrize("name", TESTS)
def test_a_test_that_the_page_names_exists(name: str) -> None:
    path, function = name.split("::")
    body = ast.parse((ROOT / path).read_text()).body
    assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}


SYMBOLS = {"\\lambda": "lambda_", "^": "**"}


def evaluate(formula: str, **symbols: float) -> float:
    """Return the value of a LaTeX formula of numbers, symbols, + - / ^ and parentheses."""
    tokens = re.findall(r"\\?[A-Za-z]+(?:_\d)?|\d+|[-+/^()]", formula)
    expression = ""
    for before, token in zip(["", *tokens], tokens, strict=False):
        factor = token[0] in "(\\" or token.isalnum()
        if factor and before and before not in "+-/^(":
            expression += "*"
        expression += SYMBOLS.get(token, token.lstrip("\\"))
    return float(eval(expression, {"__builtins__": {}}, symbols))


def row(start: str) -> str:
    """Return the row of a table that starts with this cell."""
    [line] = re.findall(rf"^\| {re.escape(start)} \|.*$", PAGE.read_text(), re.MULTILINE)
    return str(line)


SGD = {"lr": 0.3, "momentum": 0.7}
GREEK = {"alpha": 0.3, "beta": 0.7, "tau": 0.2, "rho": 0.15}
METHODS: dict[str, filters.PolynomialFilter] = {
    "4": filters.HeavyBall(**SGD),
    "5": filters.Nesterov(**SGD),
    "6": filters.USAM(**SGD, rho=0.15),
    "7": filters.TwoStepUSAM(**SGD, rho=0.15, ascent="sequential"),
    "8": filters.TwoStepUSAM(**SGD, rho=0.15, ascent="anchored"),
    "9": filters.HessianUSAM(**SGD, rho=0.15),
}


@pytest.mark.parametrize("number", METHODS)
def test_the_polynomials_are_those_of_the_filters(number: str) -> None:
    (formula,) = re.findall(r"\$0 \\le (.*?) \\le E\$", row(number))
    for lam in (-9.0, -0.8, 0.6, 3.0):
        expected = 0.3 * float(METHODS[number].p(lam))
        assert evaluate(formula, **GREEK, lambda_=lam) == pytest.approx(expected)


def test_the_edges_are_those_of_the_filters() -> None:
    for name, method in [("heavy ball", METHODS["4"]), ("Nesterov", METHODS["5"])]:
        (formula,) = re.findall(rf"^\| {name} \|.*\\le s \\le (.*?)\$", PAGE.read_text(), re.M)
        assert evaluate(formula, **GREEK) == pytest.approx(0.3 * method.max_eigenvalue())


def test_the_rates_are_those_of_the_filters() -> None:
    damped = filters.HeavyBall(**SGD, dampening=0.2)
    for name, method in [("heavy ball", damped), ("Nesterov", METHODS["5"])]:
        (formula,) = re.findall(rf"^\| {name} \| \$([^$]*)\$[^|]*\|$", PAGE.read_text(), re.M)
        assert evaluate(formula, **GREEK) == pytest.approx(method.rate)


def test_every_filter_is_on_the_page() -> None:
    filters = import_module("eigenfilter.filters")
    kinds = {
        f"eigenfilter.filters.{name}"
        for name in filters.__all__
        if isinstance(getattr(filters, name), type) and name not in ("Filter", "AscentFilter")
    }
    missing = {name for name in kinds if not any(named.startswith(name) for named in FUNCTIONS)}
    assert not missing


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
