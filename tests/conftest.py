"""Shared by all tests: seeds, poisoned memory, and the selection of tests for this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: threads that wait by spinning slow every test down on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Processes of pytest-xdist share the processors.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ["EIGENFILTER_TRITON_BLOCKS"] = os.devnull  # the default, whatever was saved here

import torch

import backends
from cases import DTYPES
from run_distributed import ProcessPools, RunDistributed

# What a shell runs in the background ignores Ctrl-C, and so would the processes of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
if HAS_HYPOTHESIS:
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
    settings.load_profile("untimed")


def pytest_report_header() -> list[str]:
    missing = "hypothesis is not installed: tests that draw their cases from it are left out"
    return [] if HAS_HYPOTHESIS else [missing]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out files that cannot be imported without hypothesis: none has a test for a GPU."""
    if HAS_HYPOTHESIS or collection_path.suffix != ".py":
        return None
    return "from hypothesis import" in collection_path.read_text() or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if backends.NAME != "installed":
        _select_those_of_the_backend(config, items)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_gpu)


def _select_those_of_the_backend(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the tests that take a backend.

    On the emulated GPU these include the tests of the optimizers, and under the interpreter those
    of refused arguments.
    """
    fixtures = {"backend", "fast_backend", *(["host_backend"] if backends.INTERPRETED else [])}

    def chosen(item: pytest.Item) -> bool:
        if any(item.get_closest_marker(name) for name in ("gpu", "slow", "distributed")):
            return False
        optimizes = backends.EMULATED and "optimizers" in item.path.parts
        return optimizes or bool(fixtures & set(getattr(item, "fixturenames", ())))

    others = [item for item in items if not chosen(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if chosen(item)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(scope="session")
def run_distributed() -> Iterator[RunDistributed]:
    """Call a function in several processes that share a Gloo process group.

    `results = run_distributed(fn, n, *args)` calls `fn(rank, *args)` in each of n processes and
    returns the n results. `fn` stands at the top level of a test's module; its results and its
    arguments can be pickled. If it raises in a process, or a process ends
    or takes too long, the test fails with the ranks and tracebacks.

    A call with the same function and arguments is not run again: it returns a copy of the results,
    or fails as before, so several tests may look at one scenario. Processes are started once for
    each n and are replaced after a failure. Before each call they reset what torch has once for
    each process: the seed, one thread, the default dtype. Warnings are errors, unless `fn` filters
    them: its filters end with it.
    """
    pools = ProcessPools()
    yield pools.run
    pools.close()


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
