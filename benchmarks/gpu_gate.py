"""Everything that needs a GPU, in stages of less than ten minutes; no network is needed.

    make gpu-gate                              all stages, in this order
    make gpu-gate STAGES="build smoke"         some of them
    python3 benchmarks/gpu_gate.py --list      what they are

A stage that passed is not run again unless --again is given, or the sources or the GPU are others.
A stage that fails does not keep the next from running; the exit code is 1 if any failed or was left
out for want of time (--within), else 0. Each stage writes NAME.json (date, GPU, versions, exit
statuses) and NAME.log into benchmarks/results/gpu-gate; with --out FOLDER, or where the variable
OUT names a folder, they are copied there as one archive after every stage.

Uses the python that runs this if it has torch (it then also needs triton, pytest, pybind11 and
scikit-build-core; the installation goes to build/gpu-gate and leaves the python as it is), else the
.venv that `make install` makes. Needs nothing but the standard library itself: it builds the rest.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-gate"
RESULTS = ROOT / "benchmarks" / "results"
OWN = RESULTS / "gpu-gate"
SOURCES = ("CMakeLists.txt", "pyproject.toml", "csrc", "python", "benchmarks", "tests")
PACKAGES = ("torch", "triton", "numpy", "pytest", "pybind11", "scikit-build-core", "ninja", "cmake")

GRACE = 20  # seconds to write down what there is, for a program that is told to stop

# What NVIDIA's tools say on machines that do not let them at the GPU.
REFUSALS = ("Device not supported", "LibraryNotLoaded", "ERR_NVGPUCTRPERM")

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
    raise SystemExit("this build is without CUDA kernels: run the stage build")
device = torch.device("cuda", torch.cuda.current_device())
if reason := dispatch.lacking(device):
    raise SystemExit(f"this build has no code for the GPU: {reason}")
print(f"eigenfilter {eigenfilter.__version__} from {eigenfilter.__path__[0]}, "
      f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
"""


@dataclass(frozen=True)
class Command:
    """A program of a stage, and what its environment has beside this one's."""

    argv: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Some commands, which all run, whichever fail.

    Attributes:
        name: as it is asked for.
        summary: what it does, in one line.
        seconds: after which it is stopped; with what follows, all take less than ten minutes.
        commands: made when the stage begins; a string says why the machine cannot run it.
        needs_gpu: whether it is preceded by a check that the build and the GPU are there.
        is_there: whether what it made still is; a stage that passed is run again if not.
        by_tool: whether it runs a tool of NVIDIA's that some machines do not let at the GPU.
    """

    name: str
    summary: str
    seconds: int
    commands: Callable[[], list[Command] | str]
    needs_gpu: bool = True
    is_there: Callable[[], bool] = lambda: True
    by_tool: bool = False


def build() -> list[Command]:
    """Compile for the H100 and H200 alone, all sources side by side."""
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
    """Whether an installation is there; the check before each stage says if it is no good."""
    return any(SITE.glob("eigenfilter/_core*.so")) if HAS_TORCH else Path(PYTHON).exists()


def smoke() -> list[Command]:
    """Every kernel on every backend, against the reference."""
    return [Command([*EIGENFILTER, "bench", "smoke", "--device", "cuda", "--out", str(OWN)])]


def tests() -> list[Command]:
    """The tests marked gpu: in 8 processes and stopped after 120 s each, where plugins allow it."""
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={OWN / 'tests.xml'}"]
    if has("xdist"):
        options += ["-n", "8"]
    else:
        print("pytest-xdist is not installed: the tests run in one process")
    if has("pytest_timeout"):
        options += ["--timeout=120"]
    else:
        print(
            "pytest-timeout is not installed: a test that hangs ends the stage; its stack is shown"
        )
        options += ["-o", "faulthandler_timeout=120"]
    if has("pytest_benchmark"):  # warns that it is of no use beside xdist, and warnings are errors
        options += ["-p", "no:benchmark"]
    return [Command([PYTHON, "-m", "pytest", "tests", *options])]


def bench() -> list[Command]:
    """The kernels first, then the optimizers on the smallest and the largest tensors."""

    def timed(*patterns: str) -> Command:
        only = [word for pattern in patterns for word in ("--only", pattern)]
        common = ["--device", "cuda", "--repeat", "30", "--out", str(RESULTS)]
        return Command([*EIGENFILTER, "bench", *only, *common])

    memory = [*EIGENFILTER, "bench", "memory", "--device", "cuda", "--out", str(RESULTS)]
    return [
        timed(*(f"*-{dtype}" for dtype in DTYPES), "three-term-*", "orthonormalise-*"),
        timed("*-small", "sgd-small-warm", "*-large"),
        Command(memory),
    ]


def sanitize() -> list[Command] | str:
    """Few small tensors: every access is looked at, each allocation by itself."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        return "compute-sanitizer is not on this machine"
    sweep = [*EIGENFILTER, "bench", "smoke", "--device", "cuda", "--size", "1", "--size", "4097"]
    by_itself = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def under(name: str, backend: str) -> Command:
        checked = [sanitizer, "--tool", name, "--error-exitcode", "3"]
        return Command([*checked, *sweep, "--only", backend, "--out", str(OWN / name)], by_itself)

    return [under("memcheck", "native"), under("racecheck", "native"), under("memcheck", "triton")]


def profile() -> list[Command] | str:
    """How busy the memory is, and how often banks of shared memory conflict."""
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
    ours = "update|squares|nonfinite|dots|subtract|add_tiles|add_sums|three_term|gram|mix_rows"
    options = ["--csv", "--clock-control", "none", "--metrics", ",".join(metrics)]
    options += ["--kernel-name", f"regex:^({ours})_kernel", "--launch-count", "400"]
    options += ["--log-file", "stdout"]  # the table, and why it cannot be: both are in the log
    timed = [*EIGENFILTER, "bench", "--device", "cuda", "--repeat", "1", "--out", str(OWN / "ncu")]
    only = [word for dtype in ("float32", "bfloat16") for word in ("--only", f"*-{dtype}")]
    return [Command([profiler, *options, *timed, *only])]


def tune() -> list[Command]:
    """Which sizes of Triton's blocks are the fastest; what is saved is a file of the results."""
    sizes = {"EIGENFILTER_TRITON_BLOCKS": str(OWN / "triton-blocks.json")}
    table = [*EIGENFILTER, "bench", "triton-blocks", "--device", "cuda", "--save"]
    return [Command([*table, "--out", str(RESULTS)], sizes)]


STAGES = (
    Stage("build", "compile the CUDA kernels for sm_90 and install", 300, build, False, is_built),
    Stage("smoke", "every kernel on every backend, against the reference", 420, smoke),
    Stage("tests", "the tests marked gpu", 480, tests),
    Stage("bench", "time the kernels, then the optimizers", 500, bench),
    Stage("sanitize", "compute-sanitizer: memcheck and racecheck", 480, sanitize, by_tool=True),
    Stage(
        "profile",
        "ncu: DRAM throughput and bank conflicts of the kernels",
        480,
        profile,
        by_tool=True,
    ),
    Stage("tune", "time the sizes of Triton's blocks", 500, tune),
)


def tool(name: str) -> str | None:
    """Where a tool of NVIDIA's is: on the PATH, or where CUDA and Nsight put it."""
    folders = sorted(glob.glob("/usr/local/cuda*/bin") + glob.glob("/opt/nvidia/nsight-compute/*"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def has(module: str) -> bool:
    """Whether the python that runs the tests has a module."""
    if HAS_TORCH:
        return importlib.util.find_spec(module) is not None
    return subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0


def last_line(*argv: str) -> str:
    """The last line that a program prints, or why it cannot be asked."""
    try:
        found = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return (found.strip().splitlines() or ["unknown"])[-1]


def machine() -> dict[str, Any]:
    """The GPU, and the versions that results depend on."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "gpu": last_line("nvidia-smi", *query),
        "python": sys.version.split()[0],
        "nvcc": last_line(tool("nvcc") or "nvcc", "--version"),
        **{package: version(package) for package in PACKAGES},
    }


def fingerprint() -> str:
    """A number that changes with any source."""
    found = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for path in files:
            if path.suffix in (".py", ".pyi", ".cpp", ".hpp", ".cu", ".cuh", ".txt", ".toml"):
                found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def run_command(command: Command, seconds: float, log: TextIO) -> tuple[int, str]:
    """Run a program, its output to the log and on.

    Returns:
        Its exit status, 124 if it is stopped; and which of REFUSALS it said, or "".
    """
    path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
    if HAS_TORCH:
        environment["PYTHONPATH"] = path
    _say(log, f"$ {' '.join(command.argv)}")
    try:
        process = subprocess.Popen(
            command.argv,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        _say(log, f"cannot be started: {error}")
        return 127, ""
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.send_signal(signal.SIGINT)

    timers = [
        threading.Timer(seconds, stop),
        threading.Timer(seconds + GRACE, os.killpg, (process.pid, signal.SIGKILL)),
    ]
    for timer in timers:
        timer.start()
    try:
        assert process.stdout is not None
        refusal = ""
        for line in process.stdout:
            _say(log, line.rstrip("\n"))
            refusal = refusal or next((said for said in REFUSALS if said in line), "")
        process.stdout.close()
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        for timer in timers:
            timer.cancel()
    if stopped.is_set():
        _say(log, f"stopped after {seconds:.0f} s")
        return 124, ""
    return status, refusal


def run_stage(stage: Stage, seconds: float, source: str) -> str:
    """Run a stage within some seconds, write its results, return how it ended."""
    began, date = time.monotonic(), datetime.datetime.now(datetime.UTC)
    ended: list[dict[str, Any]] = []
    failures: list[str] = []  # what each command that failed said of the machine, or ""
    status, reason = "passed", ""
    log_path = OWN / f"{stage.name}.log"
    with log_path.open("w") as log:
        commands = stage.commands()
        if isinstance(commands, str):
            status, reason, commands = "unavailable", commands, []
            _say(log, reason)
        elif stage.needs_gpu:
            commands = [Command([PYTHON, "-c", CHECK]), *commands]
        for i, command in enumerate(commands):
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                _say(log, f"no time is left for {' '.join(command.argv)}")
                code, refusal = 124, ""
            else:
                code, refusal = run_command(command, left, log)
            ended.append({"argv": list(command.argv), "exit": code})
            if code != 0:
                failures.append(refusal)
            if code != 0 and i == 0 and stage.needs_gpu:
                break  # nothing else can pass
    if failures:
        status = "failed"
    if failures and stage.by_tool and all(failures):
        status = "unavailable"
        reason = f"the machine does not let the tool at the GPU: {failures[0]}"
    found = {
        "stage": stage.name,
        "status": status,
        "reason": reason,
        "date": date.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "commands": ended,
        "sources": source,
        "machine": machine(),
    }
    (OWN / f"{stage.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return status


def passed_before(stage: Stage, source: str) -> bool:
    """Whether the stage passed with these sources on such a GPU, and what it made is there."""
    try:
        found = json.loads((OWN / f"{stage.name}.json").read_text())
        before = found["sources"], found["machine"]["gpu"], found["status"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or cut short
        return False
    return before == (source, machine()["gpu"], "passed") and stage.is_there()


def deliver(out: str | None, began: float) -> None:
    """Copy the results to a folder: one archive, however many files there are."""
    if not out:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    with tarfile.open(Path(out) / "gpu-gate.tar.gz", "w:gz") as archive:
        archive.add(OWN, "gpu-gate")
        for path in sorted(RESULTS.glob("*-cuda*")):
            if path.stat().st_mtime >= began:
                archive.add(path, path.name)


def _say(log: TextIO, line: str) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


def parse(arguments: Sequence[str], stages: Sequence[Stage]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in stages]
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--again", action="store_true", help="run also what has passed")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default=os.environ.get("OUT"),
        help="copy the results there (default: the variable OUT)",
    )
    parser.add_argument(
        "--within",
        type=float,
        metavar="SECONDS",
        help="begin no stage after so long, and stop the one that runs then",
    )
    args = parser.parse_args(arguments)
    for name in args.stages:
        if name not in names:
            parser.error(f"no stage {name!r}: choose of {', '.join(names)}")
    return args


def main(arguments: Sequence[str], stages: Sequence[Stage] = STAGES) -> int:
    """Run the stages that are asked for, in their order; return the exit code."""
    args = parse(arguments, stages)
    if args.list:
        for stage in stages:
            print(f"{stage.name:10} {stage.summary} (at most {stage.seconds} s)")
        return 0
    began, on_clock = time.monotonic(), time.time()
    OWN.mkdir(parents=True, exist_ok=True)
    endings: dict[str, str] = {}
    for stage in stages:
        if args.stages and stage.name not in args.stages:
            continue
        source = fingerprint()
        left = float("inf") if args.within is None else args.within - (time.monotonic() - began)
        if not args.again and passed_before(stage, source):
            endings[stage.name] = "passed before"
        elif left <= 0:
            endings[stage.name] = "left out for want of time"
        else:
            print(f"== {stage.name}: {stage.summary}", flush=True)
            endings[stage.name] = run_stage(stage, min(stage.seconds, left), source)
            deliver(args.out, on_clock)
    print("\n".join(f"{name:10} {ending}" for name, ending in endings.items()))
    good = {"passed", "passed before", "unavailable"}
    return 0 if good.issuperset(endings.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
