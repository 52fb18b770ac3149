"""The examples run, and the two ways of sharing out agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def launched(*arguments: str) -> list[list[float]]:
    """What each of two processes of torchrun prints: elements that it holds, and eigenvalues."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(EXAMPLES / "curvature_torchrun.py")
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", script, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    pattern = r"process \d: ([\d,]+) of 1,893 elements a vector; eigenvalues((?: \d\.\d{3}){3})"
    found = re.findall(pattern, done.stdout)
    return [[float(held.replace(",", "")), *map(float, values.split())] for held, values in found]


@pytest.mark.distributed
@pytest.mark.slow
def test_curvature_under_torchrun() -> None:
    whole, sliced = launched(), launched("--fsdp")
    assert [held for held, *_ in whole] == [1893, 1893]
    assert sum(held for held, *_ in sliced) == 1893
    (_, *values), (_, *others) = whole
    assert values == others
    assert len(values) == 3
    for _, *found in sliced:
        assert found == pytest.approx(values, abs=2e-3)
