"""Optimizers are tested in poisoned memory."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def poisoned_memory(poisoned: None) -> None:
    pass
