"""The emulator ends a process at an error that a GPU could hide, and names its place."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cuda_on_cpu.translate import translate

HERE = Path(__file__).parent
SOURCE = (HERE / "faulty.cu").read_text()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC"),
]


def line_of(comment: str) -> int:
    """Return the number of the line that ends with this comment."""
    [line] = [i for i, text in enumerate(SOURCE.splitlines(), 1) if text.endswith(f"// {comment}")]
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faulty")


@functools.cache
def build(folder: Path, sanitizer: str) -> Path:
    """Compile the faulty kernels to a program."""
    source = folder / "faulty.cpp"
    source.write_text(translate(SOURCE, "faulty.cu"))
    program = folder / sanitizer
    flags = {
        "none": ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-DEMULATOR_UBSAN"],
        "address": ["-fsanitize=address", "-DEMULATOR_ASAN"],
        "thread": ["-fsanitize=thread", "-DEMULATOR_TSAN"],
    }[sanitizer]
    include = [f"-I{HERE}", f"-I{HERE / 'include'}"]
    objects = []
    for file in (
        source,
        *(HERE / f"{name}.cpp" for name in ("emulator", "device_memory", "faults")),
    ):
        own = flags if file == source else [flag for flag in flags if flag.startswith("-D")]
        out = folder / f"{file.stem}.{sanitizer}.o"
        subprocess.run(
            ["g++", "-std=gnu++17", "-O1", "-g1", *include, *own, "-c", file, "-o", out], check=True
        )
        objects.append(out)
    subprocess.run(["g++", *flags, *objects, "-o", program], check=True)
    return program


def run(folder: Path, name: str, sanitizer: str = "none") -> subprocess.CompletedProcess[str]:
    command = [str(build(folder, sanitizer)), name]
    if sanitizer == "thread":
        command = ["setarch", "-R", *command]
    leaks = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, env=leaks)


@pytest.mark.parametrize("sanitizer", ["none", "address", "thread"])
def test_a_sound_kernel_runs(sanitizer: str, folder: Path) -> None:
    process = run(folder, "sound", sanitizer)
    assert (process.returncode, process.stdout) == (0, "no error\n"), process.stderr


def test_an_impossible_launch_is_an_error_as_on_a_gpu(folder: Path) -> None:
    process = run(folder, "too_many_threads")
    assert (process.returncode, process.stdout) == (0, "invalid configuration argument\n")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("left_barrier", "left", "a barrier that not all threads reach: some have left"),
        ("other_barrier", "one|other", "a barrier that not all threads reach: some are at another"),
        ("left_shuffle", "gone", "a shuffle that not all lanes reach: some have left"),
        ("beyond_shared", "beyond shared", "index 64 out of bounds"),
        ("misaligned", "misaligned", "misaligned address"),
    ],
)
def test_the_block_the_thread_and_the_line(
    name: str, line: str, message: str, folder: Path
) -> None:
    process = run(folder, name)
    assert process.returncode != 0
    assert message in process.stderr
    assert re.search(r"in block \(0, 0\), thread \d+", process.stderr)
    numbers = {line_of(each) for each in line.split("|")}
    assert any(re.search(rf"faulty\.cu:{number}\b", process.stderr) for number in numbers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_device", r"an access outside device memory.*\n.*in block \(0, 0\), thread \d+"),
        ("beside", r"faulty\.cu:\d+: the kernel wrote beside its tensors"),
        ("host_reads", r"the host touched device memory"),
        ("wrong_device", r"faulty\.cu:\d+: a launch on another device than the tensors'"),
    ],
)
def test_device_memory(name: str, message: str, folder: Path) -> None:
    process = run(folder, name)
    assert process.returncode != 0
    assert re.search(message, process.stderr)


def test_the_address_sanitizer_sees_a_stray_access(folder: Path) -> None:
    process = run(folder, "beside", "address")
    assert process.returncode != 0
    assert "AddressSanitizer: use-after-poison" in process.stderr
    assert "in block (0, 0), thread 63" in process.stderr


@pytest.mark.parametrize(
    ("name", "line"), [("missing_barrier", "unordered"), ("blocks_race", "by every block")]
)
def test_the_thread_sanitizer_sees_races_of_threads_and_of_blocks(
    name: str, line: str, folder: Path
) -> None:
    process = run(folder, name, "thread")
    assert process.returncode != 0
    assert "ThreadSanitizer: data race" in process.stderr
    assert f"faulty.cu:{line_of(line)}" in process.stderr


def test_no_line_moves() -> None:
    assert translate(SOURCE, "faulty.cu").count("\n") == SOURCE.count("\n") + 1


@pytest.mark.parametrize("left", ["extern __shared__ float x[];", 'asm volatile("bar.sync 0;");'])
def test_what_is_not_translated_is_refused(left: str) -> None:
    with pytest.raises(ValueError, match=r"in a form that is not translated"):
        translate(f"__global__ void f() {{ {left} }}\n", "f.cu")
