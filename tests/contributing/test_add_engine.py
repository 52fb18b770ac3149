"""CONTRIBUTING.md's "How to add an engine" adds one, in two files, and it is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from contributing.checkout import Checkout


@pytest.mark.slow
def test_two_steps_add_an_engine(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    assert checkout.follow("How to add an engine") == [
        "python/eigenfilter/curvature/engines/fresh_graph.py",
        "docs/curvature.md",
    ]
    names = ("products", "algebra", "data", "fixed_function", "gradient_coverage", "weights")
    tests = [f"tests/curvature/test_{name}.py" for name in names]
    assert checkout.pytest(*tests, "-k", "fresh_graph") > 50
    checkout.pytest("tests/curvature/test_registry.py")  # with the documentation's table
