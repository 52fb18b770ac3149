"""Fixtures that tests of the experiments share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eigenfilter.experiments.reproduce.plan import EXPERIMENTS
from experiments.reproductions import STABLE, TINY


@pytest.fixture(scope="module")
def tiny() -> Iterator[pytest.MonkeyPatch]:
    """Replace MNIST by digits with runs that diverge, and Fashion-MNIST by digits without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "mnist", TINY)
        patch.setitem(EXPERIMENTS, "fashion", STABLE)
        yield patch
