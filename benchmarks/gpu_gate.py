"""Everything that needs a GPU, in stages of less than ten minutes; no network is needed.

    make gpu-gate                              all stages, in this order
    make gpu-gate STAGES="build smoke"         some of them
    python3 -m benchmarks.gpu_gate --list      list the stages

A stage that has passed is skipped, unless --again is there or the sources or the GPU have changed.
If a stage fails, the next one still runs. The exit code is 1 if any stage failed or was left out
for lack of time (--within), else 0. Each stage writes NAME.json (date, GPU, versions, exit
statuses) and NAME.log into benchmarks/results/gpu-gate. With --out FOLDER, or if the variable OUT
names a folder, they are copied there as one archive after every stage. A program that is still
running when its stage's time is over, or when the gate is interrupted (Ctrl-C, SIGTERM), is
interrupted too. It then has some seconds to write its results, which are copied as well.

If the python that runs the gate has torch, it is used for everything. It then also needs triton,
pytest, pybind11 and scikit-build-core. The installation goes to build/gpu-gate, and the python
itself stays as it is. Otherwise the gate uses the .venv that `make install` makes. The gate needs
only the standard library: it builds the rest.
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

GRACE = 20  # seconds for an interrupted program to write its results
STOPPED, INTERRUPTED = 124, 130  # exit statuses, the same as in a shell


def last_line(*argv: str) -> str:
    """Return the last line that a program prints, or why it cannot be run."""
    try:
        output = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return (output.strip().splitlines() or ["unknown"])[-1]


def machine() -> dict[str, Any]:
    """Return the GPU, and the versions that results depend on."""

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
    """Return a hash of all sources."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = gpu_stages.ROOT / name
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for path in files:
            if path.suffix in (".py", ".pyi", ".cpp", ".hpp", ".cu", ".cuh", ".txt", ".toml"):
                digest.update(
                    str(path.relative_to(gpu_stages.ROOT)).encode() + b"\0" + path.read_bytes()
                )
    return digest.hexdigest()[:16]


def run_command(command: Command, seconds: float, log: TextIO) -> tuple[int, str]:
    """Run a program; print its output and write it to the log.

    Args:
        command: the program.
        seconds: the time after which it is stopped.
        log: the log.

    Returns:
        Its exit status, or STOPPED or INTERRUPTED if it did not end by itself. And which of
        REFUSALS it printed, or "".
    """
    path = os.pathsep.join(filter(None, [str(gpu_stages.SITE), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
    if gpu_stages.HAS_TORCH:
        environment["PYTHONPATH"] = path
    _print(log, f"$ {' '.join(command.argv)}")
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
        _print(log, f"cannot be started: {error}")
        return 127, ""
    timeout = threading.Event()
    killer = threading.Timer(GRACE, _signal, (process, signal.SIGKILL))

    def interrupt() -> None:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(RuntimeError):  # an earlier interrupt has started it
            killer.start()

    def stop() -> None:
        timeout.set()
        interrupt()

    timer = threading.Timer(seconds, stop)
    timer.start()
    refusals: list[str] = []
    try:
        try:
            _follow(process, log, refusals)
        except KeyboardInterrupt:
            _print(log, "interrupted")
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
    if timeout.is_set():
        _print(log, f"stopped after {seconds:.0f} s")
        return STOPPED, ""
    return process.returncode, next(iter(refusals), "")


def _follow(process: subprocess.Popen[str], log: TextIO, refusals: list[str]) -> None:
    """Print and log a program's output until it ends; add the refusals in it to the list."""
    assert process.stdout is not None
    for line in process.stdout:
        _print(log, line.rstrip("\n"))
        refusals += [refusal for refusal in gpu_stages.REFUSALS if refusal in line]
    process.wait()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal a program and its children, as Ctrl-C does; profilers do not forward signals."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_stage(stage: Stage, seconds: float, source: str) -> str:
    """Run a stage and write its results.

    Args:
        stage: the stage.
        seconds: the time after which it is stopped.
        source: the sources' fingerprint.

    Returns:
        The status: "passed", "failed", "interrupted" or "unavailable".
    """
    start, date = time.monotonic(), datetime.datetime.now(datetime.UTC)
    exits: list[dict[str, Any]] = []
    failures: list[str] = []  # for each command that failed: the refusal in its output, or ""
    status, reason = "passed", ""
    log_path = gpu_stages.GATE_RESULTS / f"{stage.name}.log"
    with log_path.open("w") as log:
        commands = stage.commands()
        if isinstance(commands, str):
            status, reason, commands = "unavailable", commands, []
            _print(log, reason)
        elif stage.needs_gpu:
            commands = [Command([gpu_stages.PYTHON, "-c", gpu_stages.CHECK]), *commands]
        for i, command in enumerate(commands):
            remaining = seconds - (time.monotonic() - start)
            if remaining <= 0:
                _print(log, f"no time is left for {' '.join(command.argv)}")
                code, refusal = STOPPED, ""
            else:
                code, refusal = run_command(command, remaining, log)
            exits.append({"argv": list(command.argv), "exit": code})
            if code != 0:
                failures.append(refusal)
            if code == INTERRUPTED or (code != 0 and i == 0 and stage.needs_gpu):
                break  # an interrupt ends the stage; without a working build nothing can pass
    if failures:
        status = "failed"
    if exits and exits[-1]["exit"] == INTERRUPTED:
        status = "interrupted"
    elif failures and stage.uses_tool and all(failures):
        status = "unavailable"
        reason = f"the machine does not let the tool use the GPU: {failures[0]}"
    result = {
        "stage": stage.name,
        "status": status,
        "reason": reason,
        "date": date.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "commands": exits,
        "sources": source,
        "machine": machine(),
    }
    (gpu_stages.GATE_RESULTS / f"{stage.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return status


def has_passed(stage: Stage, source: str) -> bool:
    """Whether the stage passed with these sources on such a GPU, and its outputs are there."""
    try:
        result = json.loads((gpu_stages.GATE_RESULTS / f"{stage.name}.json").read_text())
        previous = result["sources"], result["machine"]["gpu"], result["status"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # no file, or part of one
        return False
    return previous == (source, machine()["gpu"], "passed") and stage.has_outputs()


def deliver(out: str | None, start: float) -> None:
    """Copy the results since a time to a folder, as one archive; do nothing without a folder."""
    if not out:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    with tarfile.open(Path(out) / "gpu-gate.tar.gz", "w:gz") as archive:
        archive.add(gpu_stages.GATE_RESULTS, "gpu-gate")
        for path in sorted(gpu_stages.RESULTS.glob("*-cuda*")):
            if path.stat().st_mtime >= start:
                archive.add(path, path.name)


def _print(log: TextIO, line: str) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


def parse(arguments: Sequence[str], stages: Sequence[Stage]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in stages]
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"stages to run, from {', '.join(names)} (default: all)",
    )
    parser.add_argument("--again", action="store_true", help="also run stages that have passed")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default=os.environ.get("OUT"),
        help="copy the results to this folder (default: the variable OUT)",
    )
    parser.add_argument(
        "--within",
        type=float,
        metavar="SECONDS",
        help="after this time, stop the stage that is running and start no other",
    )
    args = parser.parse_args(arguments)
    for name in args.stages:
        if name not in names:
            parser.error(f"no stage {name!r}: choose from {', '.join(names)}")
    return args


def main(arguments: Sequence[str], stages: Sequence[Stage] = STAGES) -> int:
    """Run the stages that the arguments name, in the order of the gate; return the exit code."""
    args = parse(arguments, stages)
    if args.list:
        for stage in stages:
            print(f"{stage.name:10} {stage.summary} (at most {stage.seconds} s)")
        return 0
    start, start_on_clock = time.monotonic(), time.time()
    gpu_stages.GATE_RESULTS.mkdir(parents=True, exist_ok=True)
    endings: dict[str, str] = {}
    for stage in stages:
        if args.stages and stage.name not in args.stages:
            continue
        source = fingerprint()
        remaining = float("inf")
        if args.within is not None:
            remaining = args.within - (time.monotonic() - start)
        if not args.again and has_passed(stage, source):
            endings[stage.name] = "passed before"
        elif remaining <= 0:
            endings[stage.name] = "left out for lack of time"
        else:
            print(f"== {stage.name}: {stage.summary}", flush=True)
            endings[stage.name] = run_stage(stage, min(stage.seconds, remaining), source)
            deliver(args.out, start_on_clock)
            if endings[stage.name] == "interrupted":
                break
    print("\n".join(f"{name:10} {ending}" for name, ending in endings.items()))
    good = {"passed", "passed before", "unavailable"}
    return 0 if good.issuperset(endings.values()) else 1


if __name__ == "__main__":
    # A shell's background jobs ignore Ctrl-C, and so would the stages. SIGTERM is treated alike.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
