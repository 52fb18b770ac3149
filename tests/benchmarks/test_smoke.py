"""The sweep over all kernels: cases that disagree with the reference are named."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import native_stub, smoke
from eigenfilter import kernels
from eigenfilter.experiments.cli import main
from eigenfilter.kernels._op import OPERATIONS

EXTENSION = Path(__file__).parents[2] / native_stub.EXTENSION


def sweep(folder: Path, *sizes: int) -> tuple[int, list[dict]]:
    options = [word for size in sizes for word in ("--size", str(size))]
    code = main(["bench", "smoke", *options, "--out", str(folder)])
    [file] = folder.glob("*-cpu-smoke.json")
    data = json.loads(file.read_text())
    assert data["complete"]
    cases: list[dict] = data["cases"]
    return code, cases


@pytest.mark.slow
def test_every_kernel_agrees_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, cases = sweep(tmp_path, 1, 70)
    assert code == 0, capsys.readouterr().out
    assert {case["backend"] for case in cases} == {"reference", "native"}
    shapes = {(1, 1), (1, 70), (smoke.LONG_LIST, smoke.LONG_LIST_SIZE)}
    assert {(case["tensors"], case["size"]) for case in cases} == shapes
    assert {case["shift"] for case in cases} == {0, 1}
    names = {case["kernel"].partition(",")[0] for case in cases}
    assert names == set(kernels.__all__) - {"BACKENDS", "Backend", "select", "cholesky_qr"}
    assert f"{len(cases)} of {len(cases)} cases agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "wrong", "message"),
    [
        ("norm", "value", "off, relative to its largest number"),
        ("perturb", "bit", "list 0 differs from the reference in 1 of "),
        ("perturb", "margin", "memory beside a tensor was written into"),
        ("perturb", "error", "RuntimeError: no"),
    ],
)
def test_disagreeing_cases_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: str,
    wrong: str,
    message: str,
) -> None:
    right = OPERATIONS[kernel]._implementation("native")

    def spoiled(first: list[torch.Tensor], *args: object) -> None:
        right(first, *args)
        if wrong == "value":
            args[0].mul_(1 + 1e-5)
        elif wrong == "bit":
            first[0][-1].mul_(1.01)
        elif wrong == "margin":
            size = first[0].numel()
            first[0].as_strided((size + 1,), (1,), first[0].storage_offset())[-1] = 0
        else:
            raise RuntimeError("no")

    monkeypatch.setitem(OPERATIONS[kernel]._implementations, "native", spoiled)
    monkeypatch.setattr(
        smoke, "KERNEL_CALLS", [c for c in smoke.KERNEL_CALLS if c.name in ("norm", "perturb")]
    )
    code, cases = sweep(tmp_path, 70)
    assert code == 1
    failures = [case for case in cases if case["problem"]]
    assert {case["kernel"] for case in failures} == {kernel}
    assert {case["backend"] for case in failures} == {"native"}
    assert len(failures) == 2 * len(smoke.DTYPES) * len(smoke.SHIFTS)  # one tensor, and a long list
    assert all(message in case["problem"] for case in failures)
    assert f"- {kernel}, native, float32, 1 x 70 elements, 0 off: " in capsys.readouterr().out


@pytest.mark.skipif(
    not EXTENSION.exists(), reason="needs the extension that make host-extension builds"
)
def test_long_lists_exceed_the_small_batch() -> None:
    """This holds for every kernel over lists; five long lists also exceed a large batch."""
    code = f"""
import runpy
runpy.run_path({native_stub.__file__!r})["load"]({str(EXTENSION)!r})
import torch
from benchmarks import native_stub, smoke
for call in smoke.KERNEL_CALLS:
    if not call.as_rows:
        before = native_stub.counts()
        case = (torch.device("cpu"), torch.float32, smoke.LONG_LIST, smoke.LONG_LIST_SIZE, 0)
        smoke._results(call, "native", *case)
        launches, size = (b - a for a, b in zip(before, native_stub.counts(), strict=True))
        assert size > 4096 * launches, call.name
        if call.lists == 5:
            assert launches == 2, call.name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_has_written_its_results(
    tmp_path: Path, number: signal.Signals
) -> None:
    sweep = ["bench", "smoke", "--size", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "eigenfilter", *sweep],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # in a shell's background group it would ignore SIGINT
    )
    assert process.stdout is not None
    rows = 0
    for line in process.stdout:
        rows += line.startswith("| perturb |")
        if rows == 2:  # the first row is in the files by now
            break
    process.send_signal(number)
    process.stdout.close()
    assert process.wait() != 0
    [file], [text] = tmp_path.glob("*-cpu-smoke.json"), tmp_path.glob("*-cpu-smoke.md")
    data = json.loads(file.read_text())
    assert not data["complete"]
    assert {(case["kernel"], case["problem"]) for case in data["cases"]} == {("perturb", "")}
    assert "| perturb | float32 | 4 of 4 | 4 of 4 |" in text.read_text()
    assert re.search(r"Incomplete: [12] of \d+ rows so far\.", text.read_text())


def test_backend_without_kernels_for_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "smoke", "--only", "triton"]) == 2
    assert "no backend 'triton' serves cpu: choose one of reference, native" in (
        capsys.readouterr().err
    )
