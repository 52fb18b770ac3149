"""Sizes of the Triton kernels' blocks: timed, the better ones written down and used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import triton_blocks
from benchmarks.environment import own_process
from benchmarks.timing import Spread
from eigenfilter.experiments.cli import main
from eigenfilter.kernels.triton_blocks import Blocks


def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "triton-blocks"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_every_choice_works_and_the_best_is_used_from_then_on(tmp_path: Path) -> None:
    """Under the interpreter, with tensors that are small."""
    pytest.importorskip("triton")
    file = tmp_path / "cache" / "blocks.json"
    environment = own_process() | {
        "TRITON_INTERPRET": "1",
        "EIGENFILTER_TRITON_BLOCKS": str(file),
    }
    for task in ("measure", "use"):
        subprocess.run([sys.executable, __file__, task], check=True, env=environment)
    file.write_text('{"cpu": {"perturb": {"torch.float32": {"bytes": 1000, "warps": 4}}}}')
    check_error(
        environment, f"{file} holds no sizes of blocks: delete it (bytes must be a power of 2"
    )
    file.unlink()
    check_error(environment, f"names {file}, and there is no such file")


def test_what_was_measured_before_the_end_is_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(kernel: str, dtype: torch.dtype, device: torch.device) -> dict[Blocks, Spread]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((kernel, str(dtype)))
        return dict.fromkeys(triton_blocks.CHOICES, Spread(0.5, 0.6, 0.7))

    monkeypatch.setattr(triton_blocks, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        triton_blocks.run(torch.device("cpu"), tmp_path, save=False)
    (file,), (text,) = tmp_path.glob("*-blocks.json"), tmp_path.glob("*-blocks.md")
    found = json.loads(file.read_text())
    assert not found["complete"]
    kept = list(dict.fromkeys((row["kernel"], row["dtype"]) for row in found["triton_blocks"]))
    assert kept == measured
    assert "Incomplete: 2 of " in text.read_text()


def check_error(environment: dict[str, str], says: str) -> None:
    bad = subprocess.run(
        [sys.executable, __file__, "use"],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 1
    assert says in bad.stderr


def measure() -> None:
    """Time all choices; write the best down as if others had been."""
    from benchmarks import kernels
    from benchmarks.shapes import Problem
    from eigenfilter.kernels.triton_blocks import file, read

    kernels.problem = lambda device, dtype: Problem([(3000,)] * 2, device, dtype)
    cpu = torch.device("cpu")
    for name in kernels.KERNELS:
        found = triton_blocks.measure(name, torch.float32, cpu, repeat=1)
        assert len(found) == 12
        assert all(spread.median > 0 for spread in found.values())

    usual, other = Blocks(), Blocks(8192, 2)
    slower, faster = Spread.of([0.7, 0.8, 0.9]), Spread.of([0.91, 0.95, 0.97])
    assert triton_blocks.best({usual: slower, other: faster}) == other
    assert triton_blocks.best({usual: faster, other: slower}) == usual
    overlapping = Spread.of([0.84, 0.85, 0.97])
    assert triton_blocks.best({usual: slower, other: overlapping}) == usual

    found = {("perturb", "torch.float32"): {usual: slower, other: faster}}
    found["norm", "torch.float32"] = {usual: faster, other: slower}
    triton_blocks.write(file(), {}, torch.device("meta"), found)
    triton_blocks.write(file(), read(file()), cpu, found)
    assert read(file()) == {name: {"perturb": {"torch.float32": other}} for name in ("meta", "cpu")}


def use() -> None:
    """Perturb with what was written down, step with the default."""
    from eigenfilter import kernels
    from eigenfilter.kernels import triton_tables

    cut, blocks = triton_tables.cut, []
    triton_tables.cut = lambda *args: blocks.append(args[-1]) or cut(*args)
    x, g, b = ([torch.ones(5000)] for _ in range(3))
    kernels.perturb(x, g, b, alpha=1.0, backend="triton")
    assert bool((x[0] == 2).all())
    kernels.sgd_step(x, g, None, b, lr=0.5, backend="triton")
    assert bool((x[0] == 0.5).all())
    assert blocks == [8192 // 4, Blocks().elements(torch.float32)]


if __name__ == "__main__":
    {"measure": measure, "use": use}[sys.argv[1]]()
