"""The examples in the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest
import torch

import eigenfilter as ef

OPTIMIZERS = ("SGD", "USAM", "SAM", "TwoStepUSAM", "HessianUSAM", "AdamW", "SharpnessAware")


def modules() -> Iterator[str]:
    """The names of all modules except those of the command line, which need more packages."""
    for module in pkgutil.walk_packages(ef.__path__, "eigenfilter."):
        name = module.name
        if "experiments" not in name and "triton" not in name and not name.endswith("__main__"):
            yield name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All examples of a module, with torch and eigenfilter at hand."""
    if name.startswith("eigenfilter.integrations."):  # each needs its framework
        pytest.importorskip(name, exc_type=ModuleNotFoundError)
    module = importlib.import_module(name)
    names = {"torch": torch, "eigenfilter": ef, "ef": ef}
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_an_example(name: str) -> None:
    """An example has at least five lines."""
    docstring = inspect.getdoc(getattr(ef, name))
    assert docstring is not None
    assert docstring.count(">>> ") >= 5
