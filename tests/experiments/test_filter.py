"""eigenfilter filter prints the numbers of the filters as a table or JSON, and draws them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eigenfilter import filters
from eigenfilter.experiments.cli import main

ARGUMENTS = ["filter", "--lr", "0.1", "--momentum", "0.9", "--rho", "0.05"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--grad-norm", "0.5", "--beta1", "0.9"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["method", "gradients", "edge", "admitted", "eigenvalues"]
    assert [row.split("  ")[0] for row in rows] == [
        "heavy ball",
        "USAM",
        "SAM at gradient norm 0.5",
        "two-step USAM, sequential",
        "two-step USAM, anchored",
        "Hessian USAM",
        "AdamW",
    ]
    edge = filters.USAM(0.1, 0.9, rho=0.05).max_eigenvalue()
    assert f"{edge:.6g}" in rows[1]
    assert "[-39.3258, -20] and [0, 19.3258]" in rows[1]


def test_one_gradient_methods(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--extrapolation", "0.2", "--momentum-norm", "2", "--beta1", "0.9"]
    assert main([*ARGUMENTS, *more, "--json"]) == 0
    by_method = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    edges = {name: row["max_eigenvalue"] for name, row in by_method.items()}
    assert edges["heavy ball, extrapolation 0.2"] == pytest.approx(2 * 1.9 / 0.5)
    assert edges["MSAM at momentum norm 2"] == pytest.approx(2 * 1.9 / 0.15)
    assert edges["AdamW, extrapolation 0.2"] == pytest.approx(2 * 1.9 / (0.1 * 0.5))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ARGUMENTS, "--hessian-rho", "0.003", "--nesterov", "--json"])
    by_method = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    expected = filters.HessianUSAM(0.1, 0.9, rho=0.003, nesterov=True)
    assert by_method["Hessian USAM"]["intervals"] == [list(pair) for pair in expected.intervals()]
    assert by_method["Hessian USAM"]["gradients"] == 3
    assert by_method["Nesterov"]["max_eigenvalue"] == filters.Nesterov(0.1, 0.9).max_eigenvalue()


@pytest.mark.parametrize("more", [["--lr", "0"], ["--weight-decay", "1e9"], ["--rho", "1e200"]])
def test_json_has_no_infinity(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*ARGUMENTS, *more, "--json"])

    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads(capsys.readouterr().out, parse_constant=refuse)


@pytest.mark.parametrize(
    "more",
    [[], ["--dampening", "1"], ["--weight-decay", "100"], ["--lr", "0"], ["--extrapolation", "1"]],
)
def test_a_figure(more: list[str], tmp_path: Path) -> None:
    """The figure also works if all or no eigenvalues are admitted."""
    path = tmp_path / "new" / "filter.png"
    assert main([*ARGUMENTS, *more, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--lr", "-1"], "lr must lie in"),
        (["--momentum", "1"], "momentum must lie in"),
        (["--nesterov", "--momentum", "0"], "Nesterov needs momentum"),
        (["--grad-norm", "0"], "grad_norm must lie in"),
        (["--momentum-norm", "0"], "momentum_norm must lie in"),
        (["--extrapolation", "0.1", "--momentum", "0"], "set momentum > 0"),
        (["--plot", "/proc/nowhere/f.png"], "cannot write"),
        (["--plot", "figure"], "--plot must end in"),
        (["--plot", "f.xyz"], "--plot must end in"),
    ],
)
def test_bad_input(more: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, *more]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
