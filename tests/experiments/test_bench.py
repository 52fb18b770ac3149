"""`eigenfilter bench` and `python -m benchmarks`: where the benchmarks are, and are not."""

import subprocess
import sys
from pathlib import Path

import pytest

from eigenfilter.experiments import bench
from eigenfilter.experiments.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", [["benchmarks"], ["eigenfilter", "bench"]])
def test_both_ways_run_the_same(command: list[str]) -> None:
    """Both commands run in the root of a checkout."""
    process = subprocess.run(
        [sys.executable, "-m", *command, "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usam-small" in process.stdout


def test_without_a_checkout_it_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2, whatever is asked for."""
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--only", "usam-small"], ["memory", "--out", "here"], ["--help"]):
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err
        assert error == f"eigenfilter bench: error: {bench.ELSEWHERE}\n"


@pytest.mark.parametrize("folder", ["benchmarks", "csrc"])
def test_a_folder_of_that_name_is_no_checkout(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another project's benchmarks are not imported."""
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "bench.py"))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "benchmarks" / "command.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--list"]) == 2


@pytest.mark.slow
def test_another_package_of_that_name_does_no_harm(tmp_path: Path) -> None:
    """In the current folder, which comes first in sys.path."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    for arguments in (["--version"], ["bench", "--list"]):
        command = [sys.executable, "-m", "eigenfilter", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_other_commands_do_not_import_them() -> None:
    """Importing all benchmarks would take long."""
    code = (
        "import sys; from eigenfilter.experiments.cli import build_parser; build_parser(); "
        "print(any(name.startswith('benchmarks') for name in sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n"
