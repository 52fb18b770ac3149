"""In a forked process the kernels work alone: waiting for threads would never end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORKED = Path(__file__).with_name("forked.py")


def assert_script_succeeds(what: str, **environment: str) -> None:
    process = subprocess.run(
        [sys.executable, str(FORKED), what],
        env=dict(os.environ, PYTHONPATH=str(FORKED.parent.parent), **environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.slow
def test_kernels_and_optimizers_work_after_a_fork() -> None:
    assert_script_succeeds("main")


@pytest.mark.parametrize("threads", ["1", "2"])
def test_only_a_fork_of_threads_is_serial(threads: str) -> None:
    assert_script_succeeds(
        "alone", OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, MKL_NUM_THREADS=threads
    )
