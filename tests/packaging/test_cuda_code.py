"""The machine code of the compiled CUDA kernels: 16-byte accesses, nothing fused or spilled."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from eigenfilter import _core

pytestmark = pytest.mark.skipif(not _core.cuda_compiled, reason="built without CUDA kernels")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = ("NativeIfE", "NativeIdE", "BFloat16", "Float16")
KERNELS = {"ascend_kernel": 1, "descend_kernel": 4, "squares_kernel": 1, "nonfinite_kernel": 1}


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *arguments, _core.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dtype_of(name: str) -> str:
    return next(d for d in DTYPES if re.search(rf"\d{d}", name))


def operation(instruction: str) -> str:
    """The instruction's name; a multiply-add of the zero register only moves a value."""
    name = instruction.split()[0]
    moves = name.startswith(("FFMA", "HFMA2")) and "RZ" in instruction
    return "MOV" if moves else name


@pytest.fixture(scope="module", params=ARCHITECTURES)
def instructions(request) -> dict[str, Counter]:
    """How often each instruction occurs, by function."""
    found: dict[str, Counter] = {}
    for line in cuobjdump("-sass", "-arch", request.param).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts = found.setdefault(match[1], Counter())
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*)", line):
            counts[operation(match[1])] += 1
    return found


def of(instructions: dict[str, Counter], kernel: str) -> dict[str, Counter]:
    return {name: counts for name, counts in instructions.items() if kernel in name}


def wide(counts: Counter, access: str) -> int:
    return sum(n for op, n in counts.items() if op.startswith(access) and ".128" in op)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_there_in_every_dtype(instructions, kernel):
    dtypes = Counter(dtype_of(name) for name in of(instructions, kernel))
    assert dtypes == dict.fromkeys(DTYPES, KERNELS[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
def test_main_body_accesses_16_bytes(instructions, kernel):
    for name, counts in of(instructions, kernel).items():
        assert wide(counts, "LDG") >= 2, name
        if kernel in ("ascend_kernel", "descend_kernel"):
            assert wide(counts, "STG") >= 2, name


def test_no_multiply_add_is_fused(instructions):
    """In float32; in double the compiler's own division needs fused steps."""
    for kernel in ("ascend_kernel", "descend_kernel"):
        for name, counts in of(instructions, kernel).items():
            assert not any(op.startswith(("FFMA", "HFMA2")) for op in counts), name
            assert any(op.startswith(("FMUL", "DMUL")) for op in counts), name


def test_nothing_touches_local_memory(instructions):
    for name, counts in instructions.items():
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name


def test_ptx_for_later_chips_is_included():
    assert "sm_100" in cuobjdump("-lptx")


def test_imports_without_a_cuda_runtime():
    needed = subprocess.run(
        ["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in needed
    assert "libcuda" not in needed
