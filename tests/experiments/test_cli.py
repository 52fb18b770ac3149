"""The command line has help for every command, and one line with exit code 2 on bad input."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from eigenfilter.experiments import cli
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.errors import require


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 0
    assert "edge" in capsys.readouterr().out


def test_help_of_a_command_shows_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for option in ("--out", "--seed", "--steps", "--budget"):
        assert option in text
    assert "4000" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["nope"], "invalid choice: 'nope'"),
        (["demo", "--seed", "-1"], "--seed: must be a whole number from 0 to"),
        (["demo", "--seed", str(2**63)], "--seed: must be a whole number from 0 to"),
        (["demo", "--steps", "2.5"], "--steps: must be a whole number from 1"),
        (["demo", "--steps", "0"], "--steps: must be a whole number from 1"),
        (["demo", "--budget", "0"], "--budget: must be a number above 0, got '0'"),
        (["demo", "--budget", "nan"], "--budget: must be a number above 0"),
        (["demo", "--budget", "soon"], "--budget: must be a number above 0"),
        (["demo", "--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file" / "results")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eigenfilter demo: error: cannot write to")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines", "surrogate\udcff"])
@pytest.mark.parametrize(
    "argv",
    [["train", "--model"], ["train"], ["spectrum"], ["train", "--resume", "--out"], []],
)
def test_an_error_is_one_line_whatever_was_given(
    name: str,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--resume" in argv:
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as exit_info:
        sys.exit(main([*argv, name]))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "lines" in error or "surrogate" in error


def test_names_that_are_no_text_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example is "wrote ..." for a folder whose name has bytes of another encoding."""
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "utf-8"))
    with pytest.raises(SystemExit):
        main(["--version"])
    print("wrote \udcff", flush=True)
    assert buffer.getvalue().endswith(b"wrote \\udcff\n")


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra_is_named_before_any_work(
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--out", str(tmp_path / "new")]) == 2
    captured = capsys.readouterr()
    assert f'{module} is not installed: pip install "eigenfilter[experiments]"' in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "new").exists()


def test_a_broken_extra_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        require("half_installed")


def test_torchrun_runs_only_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "claim_first_failure", lambda: True)  # there is no store to ask
    assert main(["demo", "--out", str(tmp_path / "new")]) == 2
    assert "torchrun works with train only" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
