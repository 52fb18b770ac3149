"""The logic of the GPU gate: which stages run, and what happens if one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_gate, gpu_stages, registry
from benchmarks.gpu_gate import main
from benchmarks.gpu_stages import Command, Stage
from eigenfilter.experiments import cli


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of the test's own for results and installation, and a fixed machine."""
    monkeypatch.setattr(gpu_stages, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_stages, "GATE_RESULTS", tmp_path / "gpu-gate")
    monkeypatch.setattr(gpu_stages, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_gate, "machine", lambda: {"gpu": "a GPU"})
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


def python(code: str) -> Command:
    return Command([sys.executable, "-c", code])


def stage(name: str, *codes: str, seconds: int = 60, **options: object) -> Stage:
    commands = [python(code) for code in codes]
    return Stage(name, f"what {name} does", seconds, lambda: commands, False, **options)


def appending(name: str, file: Path, *, then: str = "pass", **options: object) -> Stage:
    """A stage that appends its name to a file each time it runs."""
    return stage(name, f"open({str(file)!r}, 'a').write({name!r}); {then}", **options)


def result(folders: Path, name: str) -> dict:
    data: dict = json.loads((folders / "gpu-gate" / f"{name}.json").read_text())
    return data


def test_stages_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["build", "smoke", "tests", "bench", "sanitize", "profile", "tune"]
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    with pytest.raises(SystemExit) as exit_info:
        main(["smok"])
    assert exit_info.value.code == 2
    assert "no stage 'smok': choose from build, smoke" in capsys.readouterr().err


def test_every_stage_takes_less_than_ten_minutes() -> None:
    assert all(stage.seconds + gpu_gate.GRACE < 600 for stage in gpu_stages.STAGES)


@pytest.mark.parametrize(("names", "expected"), [([], "abc"), (["c", "a"], "ac"), (["b"], "b")])
def test_stages_are_chosen_by_name_and_keep_their_order(
    tmp_path: Path, names: list[str], expected: str
) -> None:
    stages = [appending(name, tmp_path / "ran") for name in "abc"]
    assert main(names, stages) == 0
    assert (tmp_path / "ran").read_text() == expected


def test_the_next_stage_runs_after_a_failure(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        stage("first", "print('heard'); raise SystemExit(7)", "print('second command')"),
        Stage("missing", "a program that is not there", 9, lambda: [Command(["/no"])], False),
        stage("last", "print('last')"),
    ]
    assert main([], stages) == 1
    first = result(folders, "first")
    assert first["status"] == "failed"
    assert [command["exit"] for command in first["commands"]] == [7, 0]
    assert first["machine"] == {"gpu": "a GPU"}
    assert {"date", "seconds", "sources"} <= first.keys()
    log = (folders / "gpu-gate" / "first.log").read_text()
    assert "heard" in log
    assert "second command" in log
    assert result(folders, "missing")["commands"][0]["exit"] == 127
    assert result(folders, "last")["status"] == "passed"
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "first      failed",
        "missing    failed",
        "last       passed",
    ]


def test_stages_that_passed_run_again_only_with_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, output = tmp_path / "ran", tmp_path / "output"
    stages = [
        appending("a", ran),
        appending("b", ran, then="raise SystemExit(1)"),
        appending("c", ran, has_outputs=output.exists),
    ]
    output.touch()

    def runs(*arguments: str) -> str:
        ran.write_text("")
        main(arguments, stages)
        return ran.read_text()

    assert runs() == "abc"
    assert runs() == "b"  # the only stage that failed
    assert runs("--again", "a") == "a"
    output.unlink()
    assert runs() == "bc"  # the output of c was deleted
    output.touch()
    monkeypatch.setattr(gpu_gate, "machine", lambda: {"gpu": "another GPU"})
    assert runs("a") == "a"
    monkeypatch.setattr(gpu_gate, "fingerprint", lambda: "other sources")
    assert runs("a") == "a"
    assert runs("a") == ""


def test_the_fingerprint_depends_on_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    kernel = tmp_path / "csrc" / "cuda" / "a.cu"
    kernel.write_text("one")
    before = gpu_gate.fingerprint()
    (tmp_path / "csrc" / "notes.md").write_text("no source")
    assert gpu_gate.fingerprint() == before
    kernel.write_text("two")
    assert gpu_gate.fingerprint() != before


def test_a_stopped_stage_may_write_its_results(folders: Path) -> None:
    code = (
        "import time\nprint('began', flush=True)\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: print('wrote results')"
    )
    assert main([], [stage("slow", code, seconds=2), stage("next", "pass")]) == 1
    assert result(folders, "slow")["commands"][0]["exit"] == 124
    assert result(folders, "slow")["seconds"] < 30
    log = (folders / "gpu-gate" / "slow.log").read_text()
    assert "wrote results" in log
    assert "stopped after 2 s" in log
    assert result(folders, "next")["status"] == "passed"


def test_a_program_that_ignores_the_interrupt_is_killed(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_gate, "GRACE", 1)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert main([], [stage("deaf", code, seconds=1)]) == 1
    assert result(folders, "deaf")["commands"][0]["exit"] == 124
    assert result(folders, "deaf")["seconds"] < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_gate_delivers_its_results(
    folders: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The interrupted program may write its results, as a benchmark does; no other one starts."""
    measures = f"""
import time
try:
    print("measures", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open({str(folders / "2026-cuda.json")!r}, "w").write("half")
"""
    gate = f"""
import pathlib, runpy, sys
from unittest import mock
sys.path.insert(0, {str(gpu_stages.ROOT)!r})
from benchmarks import gpu_stages
gpu_stages.RESULTS = pathlib.Path({str(folders)!r})
gpu_stages.GATE_RESULTS = gpu_stages.RESULTS / "gpu-gate"
commands = [gpu_stages.Command([sys.executable, "-c", {measures!r}]) for _ in range(2)]
gpu_stages.STAGES = tuple(
    gpu_stages.Stage(name, "", 50, lambda: commands, False) for name in ("first", "second")
)
sys.argv = ["gpu_gate", "--out", {str(tmp_path / "out")!r}]
runpy.run_module("benchmarks.gpu_gate", run_name="__main__")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", gate],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # in a shell's background group it would ignore SIGINT
    )
    assert process.stdout is not None
    lines = []
    with process.stdout:
        for line in process.stdout:
            lines.append(line.rstrip())
            if lines[-1] == "measures":
                process.send_signal(number)
    assert process.wait() == 1
    assert lines[-1] == "first      interrupted"
    assert result(folders, "first")["status"] == "interrupted"
    assert [c["exit"] for c in result(folders, "first")["commands"]] == [gpu_gate.INTERRUPTED]
    with tarfile.open(tmp_path / "out" / "gpu-gate.tar.gz") as archive:
        names = set(archive.getnames())
    assert names == {"gpu-gate", "gpu-gate/first.json", "gpu-gate/first.log", "2026-cuda.json"}


def test_the_interrupt_reaches_the_programs_that_a_tool_runs(folders: Path, tmp_path: Path) -> None:
    inner = f"""
import time
try:
    print("began", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "written")!r}, "w").write("what there is")
"""
    tool = f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, lambda *_: None)  # like a tool that does not forward it
subprocess.run([sys.executable, "-c", {inner!r}])
"""
    assert main([], [stage("profile", tool, seconds=3)]) == 1
    assert result(folders, "profile")["commands"][0]["exit"] == gpu_gate.STOPPED
    assert (tmp_path / "written").read_text() == "what there is"


def test_the_gate_needs_nothing_but_the_standard_library() -> None:
    """A python without torch and eigenfilter runs it: -S hides both."""
    process = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.gpu_gate", "--list"],
        cwd=gpu_stages.ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("build ")
    file = gpu_stages.ROOT / "benchmarks" / "gpu_gate.py"
    process = subprocess.run([sys.executable, "-S", file], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert "python3 -m benchmarks.gpu_gate" in process.stderr


def test_the_tools_check_all_of_our_kernels() -> None:
    sources = gpu_stages.ROOT / "csrc" / "cuda"
    text = "".join(path.read_text() for path in sources.iterdir())
    native = re.findall(r"__global__ void[^{]*?\b(\w+)_kernel\(", text)
    assert sorted(native) == sorted(gpu_stages.NATIVE)
    folder = gpu_stages.ROOT / "python" / "eigenfilter" / "kernels" / "triton"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    triton = re.findall(r"@triton\.jit[^\n]*\ndef (\w+)_kernel\(", text)
    assert sorted(triton) == sorted(gpu_stages.TRITON)


def test_stages_beyond_the_time_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        appending("a", tmp_path / "ran", then="import time; time.sleep(1)"),
        stage("b", "pass"),
    ]
    assert main(["--within", "0.5"], stages) == 1
    assert "b          left out for lack of time" in capsys.readouterr().out
    assert main([], stages) == 0


@pytest.mark.parametrize("refusal", gpu_stages.REFUSALS)
def test_a_missing_or_refused_tool_is_no_failure(folders: Path, refusal: str) -> None:
    refused = f"print('Error: {refusal}'); raise SystemExit(3)"
    stages = [
        Stage("none", "", 9, lambda: "the tool is not on this machine", False, uses_tool=True),
        stage("refused", refused, uses_tool=True),
    ]
    assert main([], stages) == 0
    assert result(folders, "none")["status"] == "unavailable"
    assert result(folders, "none")["reason"] == "the tool is not on this machine"
    assert refusal in result(folders, "refused")["reason"]
    assert main([], [stage("ours", refused)]) == 1


def test_results_are_delivered_as_one_archive(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    (folders / "2020-cuda.json").write_text("old")
    new_result = folders / "2026-cuda.json"
    bench = stage("bench", f"open({str(new_result)!r}, 'w').write('new')")
    os.utime(folders / "2020-cuda.json", (0, 0))
    assert main([], [bench]) == 0
    with tarfile.open(out / "gpu-gate.tar.gz") as archive:
        names = set(archive.getnames())
    assert names == {"gpu-gate", "gpu-gate/bench.json", "gpu-gate/bench.log", "2026-cuda.json"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_a_stage_ends_after_its_check(folders: Path) -> None:
    gpu_stage = Stage("gpu_stage", "", 120, lambda: [python("print('went on')")])
    assert main([], [gpu_stage]) == 1
    assert len(result(folders, "gpu_stage")["commands"]) == 1
    log = (folders / "gpu-gate" / "gpu_stage.log").read_text()
    assert "torch sees no CUDA device" in log


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["smoke", "bench", "sanitize", "profile", "tune"])
def test_the_command_line_accepts_the_commands_of_the_stages(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the GPU is missing: the options are right, and the benchmarks exist."""
    monkeypatch.setattr(gpu_stages, "tool", lambda name: f"/opt/{name}")
    [gpu_stage] = [stage for stage in gpu_stages.STAGES if stage.name == name]
    commands = gpu_stage.commands()
    assert commands
    for command in commands:
        assert not isinstance(command, str)
        words = list(command.argv)
        at = words.index("eigenfilter")
        assert words[at - 1] == "-m"
        assert cli.main(words[at + 1 :]) == 2
        assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_kernels_are_timed_before_the_optimizers() -> None:
    first, second, _ = gpu_stages.bench()

    def names(command: Command) -> set[str]:
        words = list(command.argv)
        patterns = [words[i + 1] for i, word in enumerate(words) if word == "--only"]
        return {benchmark.name for benchmark in registry.select(patterns)}

    assert {"perturb-float32", "norm-bfloat16", "orthogonalize-float16", "lanczos-step-8"} <= names(
        first
    )
    assert {"sgd-small", "sgd-small-warm", "usam-large"} <= names(second)
    assert not names(first) & names(second)


def test_the_build_is_for_one_chip_and_uses_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "HAS_TORCH", True)
    monkeypatch.setattr(gpu_stages, "tool", lambda name: "/opt/nvcc")
    stale = tmp_path / "site" / "eigenfilter"
    stale.mkdir(parents=True)
    [command] = gpu_stages.build()
    assert not stale.exists()
    assert "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=90-real" in command.argv
    assert int(command.environment["CMAKE_BUILD_PARALLEL_LEVEL"]) >= 1
    assert command.environment["CUDACXX"] == "/opt/nvcc"
    assert not gpu_stages.is_built()


@pytest.mark.parametrize("plugins", [set(), {"xdist", "pytest_timeout", "pytest_benchmark"}])
def test_the_stage_reports_missing_plugins(
    plugins: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_stages, "has", plugins.__contains__)
    [command] = gpu_stages.tests()
    words = " ".join(command.argv)
    output = capsys.readouterr().out
    assert "--junitxml=" in words
    assert "-x" not in command.argv
    if plugins:
        assert "-n 8 --dist loadfile --timeout=120 -p no:benchmark" in words
        assert not output
    else:
        assert "faulthandler_timeout=120" in words
        assert "pytest-xdist is not installed: the tests run in one process" in output
        assert "pytest-timeout is not installed" in output
