"""What tests of the experiments share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eigenfilter.experiments.reproduce.plan import EXPERIMENTS
from experiments.reproductions import STABLE, TINY


@pytest.fixture(scope="module")
def tiny() -> Iterator[pytest.MonkeyPatch]:
    """Digits: MNIST is them with runs that diverge, Fashion-MNIST without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "mnist", TINY)
        patch.setitem(EXPERIMENTS, "fashion", STABLE)
        yield patch
