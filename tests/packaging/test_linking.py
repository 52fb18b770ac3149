"""An import of eigenfilter brings neither another torch nor a second pool of threads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eigenfilter import _core
from eigenfilter.kernels._op import OPERATIONS

ROOT = Path(__file__).parents[2]

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc")
needs_binutils = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")


def run(program: str) -> str:
    """Run a program in a process of its own and return what it prints."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@linux
@needs_binutils
def test_the_core_links_neither_torch_nor_cuda() -> None:
    listing = subprocess.run(
        ["readelf", "-d", _core.__file__], check=True, capture_output=True, text=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert "libgomp.so.1" in needed
    assert not [n for n in needed if re.search(r"torch|c10|cuda|nvrtc|python", n)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", listing), "would find another libgomp"


@linux
@needs_binutils
def test_the_core_exports_nothing_of_ours_but_its_entry() -> None:
    listing = subprocess.run(
        ["readelf", "--dyn-syms", "-W", _core.__file__], check=True, capture_output=True, text=True
    ).stdout
    exported = re.findall(r"(?:FUNC|OBJECT) +GLOBAL +DEFAULT +\d+ (\S+)", listing)
    assert "PyInit__core" in exported
    assert not [name for name in exported if re.search(r"eigenfilter|pybind11|^cuda", name)]


@linux
def test_one_openmp_runtime_is_mapped() -> None:
    runtimes = run(
        """
import re
import eigenfilter.kernels
lines = open("/proc/self/maps").read().splitlines()
for name in {line.split()[-1] for line in lines if "/" in line}:
    if re.search(r"/lib(gomp|omp|iomp5)[-.]", name):
        print(name)
"""
    ).split()
    assert len(runtimes) == 1, runtimes


@linux
def test_torchs_number_of_threads_is_obeyed_and_its_threads_are_used() -> None:
    counts = run(
        """
import os
import torch
from eigenfilter import kernels

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x, g, b = (torch.ones(4_000_000) for _ in range(3))
before = threads()
kernels.perturb([x], [g], [b], 0.1)
print(threads() - before)
torch.set_num_threads(4)
kernels.perturb([x], [g], [b], 0.1)
ours = threads()
print(ours - before)
torch.mul(x, g, out=b)
print(threads() - ours)
"""
    ).split()
    assert counts == ["0", "3", "0"]


def test_it_works_where_no_gpu_can_be_seen() -> None:
    output = run(
        """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
import eigenfilter
p = torch.nn.Parameter(torch.ones(3))
opt = eigenfilter.USAM([p], lr=0.1, rho=0.5)

def closure():
    opt.zero_grad()
    loss = (p * p).sum() / 2
    loss.backward()
    return loss

opt.step(closure)
print(round(p[0].item(), 6), torch.cuda.is_initialized())
"""
    )
    assert output.split() == ["0.85", "False"]


def test_the_sources_of_the_core_see_no_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".hpp", ".cu", ".cuh")]
    assert len(sources) > 10
    for source in sources:
        included = re.findall(r'#include [<"](.*?)[>"]', source.read_text())
        assert included or source.name == "dlpack.hpp", source
        assert not [i for i in included if re.match(r"torch|ATen|c10|caffe", i)], source
        if source.parent.name != "bindings":
            assert not [i for i in included if re.match(r"[Pp]ython|pybind11", i)], source


def test_the_stub_names_everything_else_in_the_core() -> None:
    stub = (ROOT / "python" / "eigenfilter" / "_core.pyi").read_text()
    names = set(re.findall(r"^(?:def |class )?(\w+)(?=[(:])", stub, re.MULTILINE))
    present = {name for name in dir(_core) if not name.startswith("_")}
    assert present == names | set(OPERATIONS)  # whose declarations state them
