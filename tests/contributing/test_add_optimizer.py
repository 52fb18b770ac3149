"""CONTRIBUTING.md's "How to add an optimizer" adds one, in three files, and it is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from contributing.checkout import Checkout

USES = """
import torch
import eigenfilter as ef
from benchmarks.memory import OPTIMIZERS
from benchmarks.methods import METHODS
from benchmarks.optimizers import BENCHMARKS
from eigenfilter import filters
from eigenfilter.experiments import certify
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.factories import build_optimizer
from eigenfilter.optimizers.registry import names

assert __file__ != ef.__file__ and ef.__file__.startswith({folder!r}), ef.__file__
assert names()[-1] == "halfway_usam"
x = torch.nn.Parameter(torch.ones(3))
alone = build_optimizer(Config(optimizer="halfway_usam", rho=0.1, lr=0.2, momentum=0), [x])
[flt] = filters.of(alone)
assert flt.p(2.0) == 2.0 * (1 + 0.1 * 2.0 / 2)
base = torch.optim.SGD([x], lr=0.2)
assert filters.of(ef.SharpnessAware(base, "halfway_usam", rho=0.1)) == [flt]
assert abs(filters.design("halfway_usam", flt.max_eigenvalue(), lr=0.2) - 0.1) < 1e-12
build_optimizer(Config(optimizer="adamw", method="halfway_usam"), [x])
assert "halfway-usam" in certify.METHODS
assert METHODS["halfway-usam"].accesses == METHODS["usam"].accesses
assert "halfway-usam-resnet18" in [benchmark.name for benchmark in BENCHMARKS]
assert "HalfwayUSAM" in OPTIMIZERS

A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
model = torch.nn.Module()
model.x = torch.nn.Parameter(torch.zeros(3))
model.forward = lambda inputs: (model.x @ A @ model.x / 2).expand(len(inputs))
optimizer = ef.optimizers.halfway_usam.HalfwayUSAM([model.x], lr=0.2, rho=0.1)
data = (torch.zeros(2, 1), torch.zeros(2))
report = ef.certify(model, lambda value, target: value.mean(), data, optimizer)
assert report.filter == repr(flt), report
"""


@pytest.mark.slow
def test_three_steps_add_an_optimizer(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    assert checkout.follow("How to add an optimizer") == [
        "python/eigenfilter/filters/methods.py",
        "python/eigenfilter/optimizers/halfway_usam.py",
        "tests/optimizers/problems.py",
    ]
    script = tmp_path / "uses.py"
    script.write_text(USES.format(folder=str(tmp_path)))
    checkout.python(str(script))
    shown = checkout.python("-m", "eigenfilter", "filter", "--lr", "0.2", "--rho", "0.1")
    assert "halfway USAM" in shown
    tests = [f"tests/optimizers/test_{name}.py" for name in ("conformance", "methods", "registry")]
    assert checkout.pytest(*tests, "-k", "halfway", "-m", "not slow") > 50
    checkout.pytest("tests/test_docstrings.py", "-k", "filters.methods or halfway")
