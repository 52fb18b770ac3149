"""The examples in the docstrings of the optimizers run, and print what they say."""

from __future__ import annotations

import doctest
import sys

import pytest
import torch

import eigenfilter

OPTIMIZERS = ("SGD", "USAM", "SAM", "TwoStepUSAM", "HessianUSAM", "AdamW", "SharpnessAware")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_examples_run(name: str) -> None:
    cls = getattr(eigenfilter, name)
    names = vars(sys.modules[cls.__module__]) | {"torch": torch, "eigenfilter": eigenfilter}
    [test] = doctest.DocTestFinder(recurse=False).find(cls, name, globs=names)
    assert len(test.examples) >= 5
    assert doctest.DocTestRunner().run(test).failed == 0
