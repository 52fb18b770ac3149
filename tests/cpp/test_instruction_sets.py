"""Objects built for a higher instruction set keep to themselves.

A symbol that two objects share (a template, an inline function) is kept once, and the linker may
keep the AVX-512 one: a CPU without it would then die in code that was compiled for it.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ISAS = ("baseline", "avx2", "avx512")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or shutil.which("objdump") is None,
        reason="needs g++ and binutils",
    ),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64's sets"),
]


def flags(isa: str) -> list[str]:
    """What CMakeLists.txt compiles an instruction set's loops with."""
    text = (ROOT / "CMakeLists.txt").read_text()
    rounding = re.search(r"set\(rounding (.*)\)", text)
    chosen = re.search(rf"set\(flags_{isa} (.*)\)", text)
    assert rounding is not None
    assert (chosen is None) == (isa == "baseline")
    return [*rounding[1].split(), *(chosen[1].split() if chosen else ())]


@pytest.fixture(scope="module", params=ISAS)
def loops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    isa = request.param
    output = tmp_path_factory.mktemp(isa) / f"{isa}.o"
    command = ["g++", "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", *flags(isa)]
    command += ["-DEIGENFILTER_X86", f"-DEIGENFILTER_ISA={isa}", "-Wno-psabi"]
    command += [f"-I{ROOT}/csrc", "-c", f"{ROOT}/csrc/cpu/loops.cpp", "-o", str(output)]
    subprocess.run(command, check=True)
    return output


def tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_table_of_loops_is_all_that_others_see(loops: Path) -> None:
    symbols = [line.split()[-2:] for line in tool("nm", "-C", loops).splitlines()]
    kinds = {kind for kind, _ in symbols}
    assert not kinds & set("WwVvuC"), "weak or common: the linker merges it with another object's"
    shared = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert shared == [f"eigenfilter::cpu::loops_{loops.stem}"]


def test_nothing_is_called_that_another_object_could_bring(loops: Path) -> None:
    wanted = {line.split()[-1] for line in tool("nm", "-u", loops).splitlines()}
    libc = {"memcpy", "memset", "memmove", "strcmp", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
    assert wanted <= libc


def test_each_set_uses_its_registers_and_no_fused_multiply_add(loops: Path) -> None:
    code = tool("objdump", "-d", "--no-show-raw-insn", loops)
    assert ("%zmm" in code) == (loops.stem == "avx512")
    assert ("%ymm" in code) == (loops.stem != "baseline")
    assert "mulps" in code
    assert not re.search(r"\bvfn?m(add|sub)", code)
