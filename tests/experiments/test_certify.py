"""eigenfilter certify: a model by its import path, output as text and JSON, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eigenfilter.experiments.cli import main
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.imports import call_imported, import_object

MODULE = """
import torch
import eigenfilter as ef
from torch import nn

def without():
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.eye(3, dtype=torch.float64) * 3**0.5
    return model, nn.MSELoss(), (x, x.sum(1, keepdim=True))

def trained():
    model, *rest = without()
    return model, *rest, ef.USAM(model.parameters(), lr=0.2, rho=0.05)

def pair():
    return without()[:2]

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Write a module with a unique name into the current folder."""
    name = "module_of_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_text_and_json(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "certificate.json"
    assert main(["certify", "--model", f"{module}:trained", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == ["verdict", "inside"]
    assert f"wrote {file}" in text
    read = json.loads(file.read_text())
    assert read["sharpness"] == pytest.approx(2.0)  # of the mean of (w_i - 1)^2 times 3
    assert read["edge"] == pytest.approx(7.3205, rel=1e-4)


def test_hyperparameters_given_here(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["certify", "--model", f"{module}:without", "--lr", "1.5", "--seed", "1"]
    assert main(argv) == 0
    assert "outside" in capsys.readouterr().out
    argv += ["--method", "two-step-usam", "--rho", "0.01", "--momentum", "0.9"]
    assert main(argv) == 0
    assert "TwoStepUSAM(lr=1.5, momentum=0.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "MODULE"], "must be module:name"),
        (["--model", "no_such_module:build"], "there is no module no_such_module"),
        (["--model", "MODULE:nothing"], "has no nothing"),
        (["--model", "MODULE:number"], "must be a function, not int"),
        (["--model", "MODULE:pair"], "must return (model, loss_fn, data)"),
        (["--model", "MODULE:without"], "returns no optimizer; give --lr"),
        (["--model", "MODULE:without", "--lr", "-1"], "lr"),
        (["--model", "MODULE:without", "--lr", "1", "--rho", "1"], "--rho needs a --method"),
        (["--model", "MODULE:trained", "--lr", "0.1"], "returns an optimizer; leave --lr out"),
        (["--model", "MODULE:trained", "--tol", "0"], "tol must be positive"),
        (["--model", "MODULE:trained", "--json", "/proc/nowhere/c.json"], "cannot write to"),
    ],
)
def test_bad_input(
    argv: list[str], says: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certify", *[text.replace("MODULE", module) for text in argv]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eigenfilter certify: error: ")
    assert says in error
    assert error.count("\n") == 1


def test_a_module_that_needs_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_another.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot import needs_another .*nowhere_to_be_found"):
        import_object("needs_another:build")


def test_names_of_installed_modules() -> None:
    assert import_object("math:pi") == pytest.approx(3.14159, rel=1e-5)
    assert call_imported("os:getcwd") == str(Path.cwd())
