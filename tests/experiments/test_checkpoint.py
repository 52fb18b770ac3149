"""Checkpoints are written atomically, and every byte is checked."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenfilter.experiments import checkpoint
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.errors import UserError


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files inside the context, so that writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Capture = pytest.CaptureFixture[str]


def state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"config": {"lr": 0.1}, "weights": torch.randn(20_000, generator=generator)}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for seed in (0, 1):
        checkpoint.write(path, state(seed))
        contents = checkpoint.read(path)
        assert contents["config"] == {"lr": 0.1}
        assert torch.equal(contents["weights"], state(seed)["weights"])
        assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("size", [0, 500, 50_000])
def test_a_full_disk_leaves_the_checkpoint_before(size: int, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, state(0))
    with file_size_limit(size), pytest.raises(UserError) as error:
        checkpoint.write(path, state(1))
    assert str(error.value) == f"cannot write {path}: File too large"
    assert torch.equal(checkpoint.read(path)["weights"], state(0)["weights"])
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_what_cannot_be_saved_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, state(0))
    with pytest.raises(Exception, match="pickle"):
        checkpoint.write(path, {"function": lambda: None})
    assert torch.equal(checkpoint.read(path)["weights"], state(0)["weights"])
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """A flipped byte may also be harmless, because the zip format has bytes that nothing reads."""
    path = tmp_path / "c.pt"
    checkpoint.write(path, state())
    raw = path.read_bytes()
    messages = []
    places = range(0, len(raw), len(raw) // 50)
    for place in places:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])
        try:
            contents = checkpoint.read(path)
        except UserError as error:
            messages.append(str(error))
        else:
            assert torch.equal(contents["weights"], state()["weights"])
    assert len(messages) > 0.9 * len(places)
    assert all(str(path) in text and "\n" not in text for text in messages)


@pytest.mark.parametrize("length", [0, 10, 5_000, -1])
def test_a_file_cut_short(length: int, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, state())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read(path)


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        checkpoint.read(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match="is not a checkpoint of eigenfilter train"):
        checkpoint.read(path)
    torch.save({"config": {}, "format": 99}, path)
    with pytest.raises(UserError, match="has format 99, and this version reads 2"):
        checkpoint.read(path)
    for other in ({"a": [1] * 1000}, "2", 2.0, True, torch.ones(3)):
        torch.save({"config": {}, "format": other}, path)
        with pytest.raises(UserError, match="is not a checkpoint of eigenfilter train"):
            checkpoint.read(path)
    torch.save({"config": {}, "format": 10**600}, path)
    with pytest.raises(UserError, match="has format a number of 1994 bits"):
        checkpoint.read(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="contains more than tensors"):
        checkpoint.read(path)


@pytest.mark.parametrize("argv", [["spectrum"], ["train", "--resume", "--out"]])
def test_another_layout_is_one_line(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {}, "format": 1}, tmp_path / "checkpoint.pt")
    assert main([*argv, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"eigenfilter {argv[0]}: error: {tmp_path / 'checkpoint.pt'} has format 1, and this "
        "version reads 2; train again, or use the version that wrote it\n"
    )
