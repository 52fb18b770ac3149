"""Sizes of the Triton kernels' blocks: each choice is the one in force while it is timed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from eigenfilter.experiments.cli import main


def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "triton-blocks"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_every_choice_works_and_is_in_force() -> None:
    """Under the interpreter, with tensors that are small."""
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1")
    subprocess.run([sys.executable, __file__], check=True, env=environment)


if __name__ == "__main__":
    import torch

    from eigenfilter.benchmarks import kernels, triton_blocks
    from eigenfilter.benchmarks.shapes import Problem
    from eigenfilter.kernels import triton_tables

    kernels.problem = lambda device, dtype: Problem([(3000,)] * 2, device, dtype)
    before = triton_blocks.chosen()
    for name in kernels.KERNELS:
        found = triton_blocks.measure(name, torch.float32, torch.device("cpu"), repeat=1)
        assert len(found) == 12
        assert all(spread.median > 0 for spread in found.values())
    assert triton_blocks.chosen() == before
    with triton_blocks.choosing((8192, 2)):
        assert triton_tables.block_size(torch.float32) == 2048
        assert triton_blocks.chosen() == (8192, 2)
