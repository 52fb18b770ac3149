"""Only one command at a time writes into a folder, and none waits for a dead process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eigenfilter.experiments import checkpoint, files, runs
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.locks import LOCK, FolderBusy, folder_lock, try_folder_lock

SMALL = ["--model", "mlp-4", "--samples", "64", "--epochs", "1", "--threads", "1"]
HOLD = """
import sys, pathlib
from eigenfilter.experiments.locks import folder_lock
with folder_lock(pathlib.Path(sys.argv[1]), "training run"):
    print("held", flush=True)
    sys.stdin.read()
"""
COMMANDS = {
    "train": ["train", *SMALL],
    "resume": ["train", "--resume"],
    "spectrum": ["spectrum", "nowhere.pt"],
    "demo": ["demo"],
    "phenomena": ["phenomena", "saddle"],
    "reproduce": ["reproduce", "mnist"],
    "bench": ["bench", "--only", "usam-*"],
    "bench table": ["bench", "finite-differences"],
}


@pytest.fixture
def lock_holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Start another process that has the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_every_command_is_refused(
    lock_holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "sweep.yaml").write_text("grid: {lr: [0.1]}")
    sweep = {"sweep": ["sweep", str(tmp_path / "sweep.yaml")]}
    for argv in (COMMANDS | sweep).values():
        assert main([*argv, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"another training run is at work in {out} (process {lock_holder.pid} on " in error
        assert error.endswith("); wait until it has ended, or give another --out\n")
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_a_killed_process_is_not_waited_for(
    lock_holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    leftover = out / ".checkpoint.pt.01234567.new"
    leftover.write_text("half")
    lock_holder.send_signal(signal.SIGKILL)
    lock_holder.wait()
    assert (out / LOCK).exists()
    with folder_lock(out, "demo"):
        assert not leftover.exists()
        assert json.loads((out / LOCK).read_text())["process"] == os.getpid()
    assert list(out.iterdir()) == []


def test_a_lock_may_be_waited_for(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "sweep") as folder:
        assert folder == tmp_path
        asked = iter([True, False])
        with pytest.raises(FolderBusy), folder_lock(tmp_path, "demo", wait=lambda: next(asked)):
            pass
        assert next(asked, None) is None
        with try_folder_lock(tmp_path, wait=lambda: False, name="other") as acquired:
            assert acquired
    first = folder_lock(tmp_path, "sweep")
    first.__enter__()

    def end() -> bool:
        first.__exit__(None, None, None)
        return True

    with folder_lock(tmp_path, "demo", wait=end):
        assert (tmp_path / LOCK).exists()


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        with folder_lock(tmp_path, "demo"):
            assert len(list(tmp_path.glob("*.new"))) == 1
        file.write(b"whole")  # type: ignore[attr-defined]

    files.replace(tmp_path / "a", fill)
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = [".new", ".notes.new", ".a.0123.new", "..01234567.new", ".a.0123456G.new", ".lock"]
    for name in names:
        (tmp_path / name).write_text("mine")
    os.mkfifo(tmp_path / ".pipe.01234567.new")
    (tmp_path / ".link.01234567.new").symlink_to(tmp_path / ".notes.new")
    before = sorted(tmp_path.iterdir())
    with folder_lock(tmp_path, "demo"):
        pass
    assert sorted(tmp_path.iterdir()) == before
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize(
    "content", ["mine", "{}", "[1]", '{"work": 1}', "[" * 50_000, "link", "pipe"]
)
def test_a_lock_of_others_is_refused(content: str, tmp_path: Path) -> None:
    lock, target = tmp_path / LOCK, tmp_path / "precious"
    target.write_text("mine")
    if content == "link":
        lock.symlink_to(target)
    elif content == "pipe":
        os.mkfifo(lock)
    else:
        lock.write_text(content)
    says = (
        r"cannot write .*Too many levels" if content == "link" else "is not a lock of eigenfilter"
    )
    with pytest.raises(UserError, match=says), folder_lock(tmp_path, "demo"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "precious"]
    assert target.read_text() == "mine"
    assert content in ("link", "pipe") or lock.read_text() == content


def test_links_and_modes_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("target")
    files.replace_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    (tmp_path / "nowhere").symlink_to("later")  # as `open` does
    files.replace_text(tmp_path / "nowhere", "new")
    assert (tmp_path / "later").read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"cannot write .*loop: Too many levels"):
        files.replace_text(tmp_path / "loop", "new")


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE, text=True) as reader:
        files.replace_text(path, "text")
        assert reader.communicate()[0] == "text"
    assert path.is_fifo()
    code = "import pathlib; from eigenfilter.experiments import files; "
    code += "files.replace_text(pathlib.Path('/dev/stdout'), 'text')"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "text"
    files.replace_text(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
    with pytest.raises(UserError, match="Is a directory"):
        files.replace_text(tmp_path, "text")


@pytest.mark.parametrize("name", ["a" * 250, "é" * 125])
def test_a_long_name(name: str, tmp_path: Path) -> None:
    files.replace_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
    with pytest.raises(UserError, match=r"cannot write .*File name too long"):
        files.replace_text(tmp_path / (name + "a" * 10), "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_error_is_reported_if_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"cannot write .*: Read-only file system"):
        files.replace_text(tmp_path / "a", "text")


def test_two_writers_of_a_file_do_not_mix(tmp_path: Path) -> None:
    """Two nested writes use different temporary files, and the last one remains."""
    path = tmp_path / "c.pt"

    def fill(file: object) -> None:
        file.write(b"outer, ")  # type: ignore[attr-defined]
        files.replace_text(path, "inner")
        assert path.read_text() == "inner"
        file.write(b"whole")  # type: ignore[attr-defined]

    files.replace(path, fill)
    assert path.read_text() == "outer, whole"


def test_the_second_of_two_trainings_touches_nothing(tmp_path: Path) -> None:
    config = Config(model="mlp-4", samples=64, epochs=3, batch_size=32, threads=1, log_every=1)
    events = []

    def second(kind: str, step: int, record: runs.Record) -> None:
        if kind == "train":
            before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
            for resume in (False, True):
                with pytest.raises(UserError, match="another training run is at work in "):
                    runs.run(Config(model="mlp-5"), tmp_path, resume=resume)
            events.append(before == {p.name: p.read_bytes() for p in tmp_path.iterdir()})

    runs.run(config, tmp_path, observe=second)
    assert events == [True] * 6
    assert checkpoint.read(tmp_path / "checkpoint.pt")["config"] == config.as_dict()
    assert not (tmp_path / LOCK).exists()


def test_an_error_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert main(["spectrum", str(tmp_path / "nowhere.pt"), "--out", str(out)]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with folder_lock(out, "demo"):
        (out / "kept").touch()
    assert [path.name for path in out.iterdir()] == ["kept"]
