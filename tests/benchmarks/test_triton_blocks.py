"""Block sizes of the Triton kernels: they are timed, and the best are saved and used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import environment, kernels, triton_blocks
from benchmarks.environment import subprocess_environment
from benchmarks.timing import Spread
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.errors import UserError
from eigenfilter.kernels.triton.blocks import VARIABLE, Blocks, read
from eigenfilter.kernels.triton.blocks import kernels as block_kernels


def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "triton-blocks"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_sizes_are_saved_for_the_kernels_that_read_them() -> None:
    assert set(block_kernels()) <= set(kernels.KERNELS)


@pytest.mark.parametrize(
    ("kernel", "dtype", "unknown"),
    [
        ("descend", "torch.float32", "descend"),
        ("sgd_step", "float32", "float32"),
        ("ascend", "float32", "ascend, float32"),
    ],
)
def test_saved_sizes_that_no_kernel_would_read_are_refused(
    kernel: str, dtype: str, unknown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"bytes": 8192, "warps": 2}
    file = tmp_path / "blocks.json"
    saved = {"cpu": {"norm": {"torch.float64": sizes}}, "a GPU": {kernel: {dtype: sizes}}}
    file.write_text(json.dumps(saved))
    message = (
        rf"blocks.json has block sizes for {unknown}, which .* Delete these entries, or the file"
    )
    with pytest.raises(ValueError, match=message):
        read(file)
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(UserError, match=message):
        environment._triton_blocks(torch.device("cpu"))
    del saved["a GPU"]
    file.write_text(json.dumps(saved))
    assert read(file) == {"cpu": {"norm": {"torch.float64": Blocks(8192, 2)}}}


@pytest.mark.slow
def test_every_choice_works_and_later_processes_use_the_best(tmp_path: Path) -> None:
    """This runs under Triton's interpreter, with small tensors."""
    pytest.importorskip("triton")
    file = tmp_path / "cache" / "blocks.json"
    variables = subprocess_environment() | {
        "TRITON_INTERPRET": "1",
        "EIGENFILTER_TRITON_BLOCKS": str(file),
    }
    for task in ("measure", "use"):
        subprocess.run([sys.executable, __file__, task], check=True, env=variables)
    file.write_text('{"cpu": {"perturb": {"torch.float32": {"bytes": 1000, "warps": 4}}}}')
    assert_error(
        variables, f"{file} holds no sizes of blocks: delete it (bytes must be a power of 2"
    )
    file.write_text('{"meta": {"ascend": {"torch.float32": {"bytes": 8192, "warps": 4}}}}')
    assert_error(variables, f"{file} has block sizes for ascend, which")
    file.unlink()
    assert_error(variables, f"names {file}, and there is no such file")


def test_an_interrupted_run_has_written_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = []

    def measure(kernel: str, dtype: torch.dtype, device: torch.device) -> dict[Blocks, Spread]:
        if len(pairs) == 2:
            raise KeyboardInterrupt
        pairs.append((kernel, str(dtype)))
        return dict.fromkeys(triton_blocks.CHOICES, Spread(0.5, 0.6, 0.7))

    monkeypatch.setattr(triton_blocks, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        triton_blocks.run(torch.device("cpu"), tmp_path, save=False)
    (file,), (text,) = tmp_path.glob("*-blocks.json"), tmp_path.glob("*-blocks.md")
    data = json.loads(file.read_text())
    assert not data["complete"]
    rows = [(row["kernel"], row["dtype"]) for row in data["triton_blocks"]]
    assert list(dict.fromkeys(rows)) == pairs
    assert "Incomplete: 2 of " in text.read_text()


def assert_error(variables: dict[str, str], message: str) -> None:
    process = subprocess.run(
        [sys.executable, __file__, "use"],
        check=False,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert message in process.stderr


def measure() -> None:
    """Time all choices; then save choices as if other times had been measured."""
    from benchmarks.shapes import TensorProblem
    from eigenfilter.kernels.triton.blocks import file

    kernels.problem = lambda device, dtype: TensorProblem([(3000,)] * 2, device, dtype)
    cpu = torch.device("cpu")
    for name in block_kernels():
        spreads = triton_blocks.measure(name, torch.float32, cpu, repeat=1)
        assert len(spreads) == 12
        assert all(spread.median > 0 for spread in spreads.values())

    default, other = Blocks(), Blocks(8192, 2)
    slower, faster = Spread.of([0.7, 0.8, 0.9]), Spread.of([0.91, 0.95, 0.97])
    assert triton_blocks.best({default: slower, other: faster}) == other
    assert triton_blocks.best({default: faster, other: slower}) == default
    overlapping = Spread.of([0.84, 0.85, 0.97])
    assert triton_blocks.best({default: slower, other: overlapping}) == default

    bandwidths = {("perturb", "torch.float32"): {default: slower, other: faster}}
    bandwidths["norm", "torch.float32"] = {default: faster, other: slower}
    triton_blocks.write(file(), {}, torch.device("meta"), bandwidths)
    triton_blocks.write(file(), read(file()), cpu, bandwidths)
    assert read(file()) == {name: {"perturb": {"torch.float32": other}} for name in ("meta", "cpu")}


def use() -> None:
    """Perturb with the saved choice, and step with the default."""
    from eigenfilter import kernels
    from eigenfilter.kernels.triton import tables as triton_tables

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
