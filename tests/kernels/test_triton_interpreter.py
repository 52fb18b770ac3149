"""The Triton kernels agree with the reference, run by triton's interpreter on CPU tensors.

The interpreter is chosen when triton is imported, so the tests proper, `interpreted.py`, run in a
process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eigenfilter import kernels

pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("interpreted.py")


@pytest.mark.slow
def test_kernels_agree_with_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env=dict(os.environ, TRITON_INTERPRET="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^[1-9]\d* passed in", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the kernels would run")
def test_a_cpu_needs_the_interpreter() -> None:
    x, g, b = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=r"needs a GPU, or TRITON_INTERPRET=1"):
        kernels.ascend([x], [g], [b], 0.1, backend="triton")
