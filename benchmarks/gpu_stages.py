"""The stages of `gpu_gate`: a stage is a list of commands, made when it begins.

This module needs only the standard library, as it also builds the rest.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-gate"
RESULTS = ROOT / "benchmarks" / "results"
GATE_RESULTS = RESULTS / "gpu-gate"

# What NVIDIA's tools print on machines that do not let them use the GPU.
REFUSALS = ("Device not supported", "LibraryNotLoaded", "ERR_NVGPUCTRPERM")

# The kernels, without the "_kernel" at the end of their names.
NATIVE = (
    *("update", "compressed"),
    *("squares", "code_squares", "finish_norm", "nonfinite"),
    *("dots", "add_tiles", "subtract", "finish_norms"),
    *("row_dots", "lanczos_step", "gram", "mix_rows", "add_sums"),
    "cross_entropy_hvp",
)
TRITON = (
    *("perturb", "perturb_hvp", "sgd_step", "adamw_step"),
    *("sum_squares", "norm", "flag_nonfinite"),
    *("dots", "add_tiles", "subtract", "norms"),
    *("row_dots", "lanczos_step", "gram", "mix_rows", "add_sums"),
    "cross_entropy_hvp",
)

DTYPES = ("float32", "float64", "bfloat16", "float16")
HAS_TORCH = importlib.util.find_spec("torch") is not None
PYTHON = sys.executable if HAS_TORCH else str(ROOT / ".venv" / "bin" / "python")
EIGENFILTER = [PYTHON, "-m", "eigenfilter"]

CHECK = """
import eigenfilter, torch
from eigenfilter import _core
from eigenfilter.kernels import dispatch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
if not _core.cuda_compiled:
    raise SystemExit("this build has no CUDA kernels: run the stage build")
device = torch.device("cuda", torch.cuda.current_device())
if reason := dispatch.missing_code(device):
    raise SystemExit(f"this build has no code for the GPU: {reason}")
print(f"eigenfilter {eigenfilter.__version__} from {eigenfilter.__path__[0]}, "
      f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
"""


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and additions to its environment."""

    argv: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A list of commands; all of them run, even if some fail.

    Attributes:
        name: the name on the command line.
        summary: what it does, in one line.
        seconds: the time after which it is stopped. With the time for writing results it is less
            than ten minutes.
        commands: makes the commands when the stage begins. A string says why the machine cannot run
            the stage.
        needs_gpu: whether a check for the build and the GPU runs before the commands.
        has_outputs: whether the stage's outputs are still there; without them it runs again.
        uses_tool: whether it runs a tool of NVIDIA's that some machines do not let use the GPU.
    """

    name: str
    summary: str
    seconds: int
    commands: Callable[[], list[Command] | str]
    needs_gpu: bool = True
    has_outputs: Callable[[], bool] = lambda: True
    uses_tool: bool = False


def build() -> list[Command]:
    """Compile for the H100 and H200 only, with one process for each core."""
    defines = {"EIGENFILTER_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": "90-real"}
    options = ["-Cbuild-dir=build/gpu-gate-objects"]
    options += [f"-Ccmake.define.{name}={value}" for name, value in defines.items()]
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    nvcc = tool("nvcc")
    if nvcc is not None:
        environment["CUDACXX"] = nvcc
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", *options]
    if HAS_TORCH:
        shutil.rmtree(SITE, ignore_errors=True)
        return [Command([*install, "--target", str(SITE), "."], environment)]
    return [Command(["make", "install"]), Command([*install, "--editable", "."], environment)]


def is_built() -> bool:
    """Whether an installation is there; the check before each stage says if it does not work."""
    return any(SITE.glob("eigenfilter/_core*.so")) if HAS_TORCH else Path(PYTHON).exists()


def smoke() -> list[Command]:
    """Every kernel on every backend, against the reference."""
    return [
        Command([*EIGENFILTER, "bench", "smoke", "--device", "cuda", "--out", str(GATE_RESULTS)])
    ]


def tests() -> list[Command]:
    """The tests marked gpu: in 8 processes, each test at most 120 s, if the plugins are there."""
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={GATE_RESULTS / 'tests.xml'}"]
    if has("xdist"):
        options += ["-n", "8", "--dist", "loadfile"]
    else:
        print("pytest-xdist is not installed: the tests run in one process")
    if has("pytest_timeout"):
        options += ["--timeout=120"]
    else:
        print(
            "pytest-timeout is not installed: a test that hangs ends the stage; its stack is shown"
        )
        options += ["-o", "faulthandler_timeout=120"]
    if has("pytest_benchmark"):  # it warns about xdist, and warnings are errors
        options += ["-p", "no:benchmark"]
    return [Command([PYTHON, "-m", "pytest", "tests", *options])]


def bench() -> list[Command]:
    """The kernels first, then the optimizers on the smallest and the largest tensors."""

    def timings(*patterns: str) -> Command:
        only = [word for pattern in patterns for word in ("--only", pattern)]
        common = ["--device", "cuda", "--repeat", "30", "--out", str(RESULTS)]
        return Command([*EIGENFILTER, "bench", *only, *common])

    memory = [*EIGENFILTER, "bench", "memory", "--device", "cuda", "--out", str(RESULTS)]
    return [
        timings(*(f"*-{dtype}" for dtype in DTYPES), "lanczos-step-*", "cholesky-qr-*"),
        timings("*-small", "sgd-small-warm", "*-large"),
        Command(memory),
    ]


def sanitize() -> list[Command] | str:
    """Check every memory access of our kernels, on a few small tensors."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        return "compute-sanitizer is not on this machine"
    sweep = [*EIGENFILTER, "bench", "smoke", "--device", "cuda", "--size", "1", "--size", "4097"]
    # Without the cache each tensor is an allocation of its own, so that no overrun is missed.
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # The sanitizer checks only launches that match a filter, which torch's kernels do not. kns
    # matches a part of the mangled name, where our namespace is. kne matches the whole name; Triton
    # does not mangle names.
    filters = {
        "native": ["--kernel-name", "kns=eigenfilter"],
        "triton": [word for name in TRITON for word in ("--kernel-name", f"kne={name}_kernel")],
    }

    def check(name: str, backend: str) -> Command:
        options = ["--tool", name, "--error-exitcode", "3", *filters[backend]]
        out = ["--out", str(GATE_RESULTS / name)]
        return Command([sanitizer, *options, *sweep, "--only", backend, *out], no_cache)

    return [check("memcheck", "native"), check("racecheck", "native"), check("memcheck", "triton")]


def profile() -> list[Command] | str:
    """Measure how busy the memory is, and count bank conflicts of shared memory."""
    profiler = tool("ncu")
    if profiler is None:
        return "ncu (Nsight Compute) is not on this machine"
    metrics = (
        "gpu__time_duration.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
        "launch__registers_per_thread",
        "sm__warps_active.avg.pct_of_peak_sustained_active",
    )
    # The filter matches the function's name without namespace and template arguments
    # (--kernel-name-base is "function" by default). Only launches that match are counted.
    ours = "|".join(sorted({*NATIVE, *TRITON}))
    options = ["--csv", "--clock-control", "none", "--metrics", ",".join(metrics)]
    options += ["--kernel-name", f"regex:^({ours})_kernel$", "--launch-count", "500"]
    options += ["--log-file", "stdout"]  # so that our log has the table, or the reason for none
    timings = [*EIGENFILTER, "bench", "--device", "cuda", "--repeat", "1"]
    only = [word for dtype in ("float32", "bfloat16") for word in ("--only", f"*-{dtype}")]
    return [Command([profiler, *options, *timings, "--out", str(GATE_RESULTS / "ncu"), *only])]


def tune() -> list[Command]:
    """Find the fastest block sizes for Triton, and save them in a file among the results."""
    sizes = {"EIGENFILTER_TRITON_BLOCKS": str(GATE_RESULTS / "triton-blocks.json")}
    table = [*EIGENFILTER, "bench", "triton-blocks", "--device", "cuda", "--save"]
    return [Command([*table, "--out", str(RESULTS)], sizes)]


STAGES = (
    Stage("build", "compile the CUDA kernels for sm_90 and install", 300, build, False, is_built),
    Stage("smoke", "every kernel on every backend, against the reference", 420, smoke),
    Stage("tests", "the tests marked gpu", 480, tests),
    Stage("bench", "time the kernels, then the optimizers", 500, bench),
    Stage("sanitize", "compute-sanitizer: memcheck and racecheck", 480, sanitize, uses_tool=True),
    Stage(
        "profile",
        "ncu: DRAM throughput and bank conflicts of the kernels",
        480,
        profile,
        uses_tool=True,
    ),
    Stage("tune", "time Triton's block sizes", 500, tune),
)


def tool(name: str) -> str | None:
    """Return the path of a tool of NVIDIA's, in PATH or the folders of CUDA and Nsight, or None."""
    folders = sorted(glob.glob("/usr/local/cuda*/bin") + glob.glob("/opt/nvidia/nsight-compute/*"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def has(module: str) -> bool:
    """Whether the python that runs the stages has a module."""
    if HAS_TORCH:
        return importlib.util.find_spec(module) is not None
    return subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0
