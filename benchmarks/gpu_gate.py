"""Everything that needs a GPU, in stages of less than ten minutes; no network is needed.

    make gpu-gate                              all stages, in this order
    make gpu-gate STAGES="build smoke"         some of them
    python3 -m benchmarks.gpu_gate --list      what they are

A stage that passed is not run again unless --again is given, or the sources or the GPU are others.
A stage that fails does not keep the next from running; the exit code is 1 if any failed or was left
out for want of time (--within), else 0. Each stage writes NAME.json (date, GPU, versions, exit
statuses) and NAME.log into benchmarks/results/gpu-gate; with --out FOLDER, or where the variable
OUT names a folder, they are copied there as one archive after every stage. What runs when a stage's
time is over, or when this is told to end (Ctrl-C, SIGTERM), is interrupted and given a while to
write down what it has, which is then copied too.

Uses the python that runs this if it has torch (it then also needs triton, pytest, pybind11 and
scikit-build-core; the installation goes to build/gpu-gate and leaves the python as it is), else the
.venv that `make install` makes. Needs nothing but the standard library itself: it builds the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

if not __package__:
    sys.exit("run this from the root of the repository: python3 -m benchmarks.gpu_gate")

# Relative: as a program this is run by a python that has no eigenfilter yet.
from . import gpu_stages
from .gpu_stages import STAGES, Command, Stage

SOURCES = ("CMakeLists.txt", "pyproject.toml", "csrc", "python", "benchmarks", "tests")
PACKAGES = ("torch", "triton", "numpy", "pytest", "pybind11", "scikit-build-core", "ninja", "cmake")

GRACE = 20  # seconds to write down what there is, for a program that is told to stop
STOPPED, INTERRUPTED = 124, 130  # exit statuses, as a shell has them


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
        "nvcc": last_line(gpu_stages.tool("nvcc") or "nvcc", "--version"),
        **{package: version(package) for package in PACKAGES},
    }


def fingerprint() -> str:
    """A number that changes with any source."""
    found = hashlib.sha256()
    for name in SOURCES:
        top = gpu_stages.ROOT / name
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for path in files:
            if path.suffix in (".py", ".pyi", ".cpp", ".hpp", ".cu", ".cuh", ".txt", ".toml"):
                found.update(
                    str(path.relative_to(gpu_stages.ROOT)).encode() + b"\0" + path.read_bytes()
                )
    return found.hexdigest()[:16]


def run_command(command: Command, seconds: float, log: TextIO) -> tuple[int, str]:
    """Run a program, its output to the log and on.

    Returns:
        Its exit status, STOPPED or INTERRUPTED if it is made to end; and which of REFUSALS it said,
        or "".
    """
    path = os.pathsep.join(filter(None, [str(gpu_stages.SITE), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
    if gpu_stages.HAS_TORCH:
        environment["PYTHONPATH"] = path
    _say(log, f"$ {' '.join(command.argv)}")
    try:
        process = subprocess.Popen(
            command.argv,
            cwd=gpu_stages.ROOT,
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
    killer = threading.Timer(GRACE, _signal, (process, signal.SIGKILL))

    def interrupt() -> None:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(RuntimeError):  # the other reason to interrupt came first
            killer.start()

    def stop() -> None:
        stopped.set()
        interrupt()

    timer = threading.Timer(seconds, stop)
    timer.start()
    refusals: list[str] = []
    try:
        try:
            _follow(process, log, refusals)
        except KeyboardInterrupt:
            _say(log, "interrupted")
            interrupt()
            _follow(process, log, refusals)
            return INTERRUPTED, ""
    except BaseException:
        _signal(process, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
        killer.cancel()
        assert process.stdout is not None
        process.stdout.close()
    if stopped.is_set():
        _say(log, f"stopped after {seconds:.0f} s")
        return STOPPED, ""
    return process.returncode, next(iter(refusals), "")


def _follow(process: subprocess.Popen[str], log: TextIO, refusals: list[str]) -> None:
    """Pass on what a program says, until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        _say(log, line.rstrip("\n"))
        refusals += [said for said in gpu_stages.REFUSALS if said in line]
    process.wait()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal a program and its children, as Ctrl-C does: profilers do not pass signals on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_stage(stage: Stage, seconds: float, source: str) -> str:
    """Run a stage within some seconds, write its results, return how it ended."""
    began, date = time.monotonic(), datetime.datetime.now(datetime.UTC)
    ended: list[dict[str, Any]] = []
    failures: list[str] = []  # what each command that failed said of the machine, or ""
    status, reason = "passed", ""
    log_path = gpu_stages.OWN / f"{stage.name}.log"
    with log_path.open("w") as log:
        commands = stage.commands()
        if isinstance(commands, str):
            status, reason, commands = "unavailable", commands, []
            _say(log, reason)
        elif stage.needs_gpu:
            commands = [Command([gpu_stages.PYTHON, "-c", gpu_stages.CHECK]), *commands]
        for i, command in enumerate(commands):
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                _say(log, f"no time is left for {' '.join(command.argv)}")
                code, refusal = STOPPED, ""
            else:
                code, refusal = run_command(command, left, log)
            ended.append({"argv": list(command.argv), "exit": code})
            if code != 0:
                failures.append(refusal)
            if code == INTERRUPTED or (code != 0 and i == 0 and stage.needs_gpu):
                break  # nothing else is to run, or can pass
    if failures:
        status = "failed"
    if ended and ended[-1]["exit"] == INTERRUPTED:
        status = "interrupted"
    elif failures and stage.by_tool and all(failures):
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
    (gpu_stages.OWN / f"{stage.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return status


def passed_before(stage: Stage, source: str) -> bool:
    """Whether the stage passed with these sources on such a GPU, and what it made is there."""
    try:
        found = json.loads((gpu_stages.OWN / f"{stage.name}.json").read_text())
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
        archive.add(gpu_stages.OWN, "gpu-gate")
        for path in sorted(gpu_stages.RESULTS.glob("*-cuda*")):
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
    gpu_stages.OWN.mkdir(parents=True, exist_ok=True)
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
            if endings[stage.name] == "interrupted":
                break
    print("\n".join(f"{name:10} {ending}" for name, ending in endings.items()))
    good = {"passed", "passed before", "unavailable"}
    return 0 if good.issuperset(endings.values()) else 1


if __name__ == "__main__":
    # In the background of a shell, Ctrl-C would be ignored, in the stages too. SIGTERM is the same.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
