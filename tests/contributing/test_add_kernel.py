"""CONTRIBUTING.md's "How to add a kernel" adds one, to all backends, and it is complete."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from contributing.checkout import Checkout

TESTS = ("tests/kernels", "-k", "cubed_step", "--deselect", "tests/kernels/test_triton_launch.py")


@pytest.mark.slow
def test_four_steps_add_a_kernel(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    touched = checkout.follow("How to add a kernel")
    assert list(dict.fromkeys(touched)) == [
        "csrc/core/rules.hpp",
        "csrc/cuda/cubed_step.cu",
        "python/eigenfilter/kernels/cubed.py",
        "python/eigenfilter/kernels/__init__.py",
        "python/eigenfilter/kernels/triton/cubed_step.py",
    ]
    built = checkout.build(".", "build", "-DEIGENFILTER_CUDA=OFF", "-DEIGENFILTER_WERROR=ON")
    [extension] = built.glob("_core*.so")
    shutil.copy(extension, tmp_path / "python/eigenfilter")
    assert checkout.pytest(*TESTS) > 100
    checkout.pytest("tests/kernels/test_operations.py", "tests/kernels/test_dispatch.py")
    checkout.pytest("tests/packaging/test_docs.py", "-k", "every_public_name")  # their entries
    checkout.build("tests/cuda_on_cpu", "build/emulated/none", "-DSANITIZER=none")
    assert checkout.pytest(*TESTS, EIGENFILTER_TEST_BACKEND="emulated") > 20
    pytest.importorskip("triton")
    interpreted = {"EIGENFILTER_TEST_BACKEND": "interpreted", "TRITON_INTERPRET": "1"}
    assert checkout.pytest(*TESTS, **interpreted) > 20
