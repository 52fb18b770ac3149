"""What all tests share: seeds, poisoned memory, and which tests this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch is imported: threads that wait by spinning slow every test down on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["EIGENFILTER_TRITON_BLOCKS"] = os.devnull  # the default, whatever was saved here

import torch

from cases import DTYPES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN: what is read before it is written shows in the result."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen
