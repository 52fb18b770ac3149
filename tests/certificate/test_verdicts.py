"""Verdicts: right where the spectrum is known, and undecided where evidence is missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from certificate.tasks import SGD, USAM, Build, certify, spectrum
from quadratics import Quadratic


@pytest.mark.parametrize(
    ("eigenvalues", "build", "upper", "saddle", "verdict"),
    [
        (spectrum(0.1, 5), SGD, "inside", "inside", "inside"),
        (spectrum(0.1, 5, 9.4), SGD, "inside", "inside", "inside"),
        (spectrum(0.1, 5, 9.6), SGD, "at the edge", "inside", "at the edge"),
        (spectrum(0.1, 5, 10.4), SGD, "at the edge", "inside", "at the edge"),
        (spectrum(0.1, 5, 10.6), SGD, "outside", "inside", "outside"),
        (spectrum(-0.1, 5), SGD, "inside", "inside", "inside"),
        (spectrum(0.1, 5, -0.5), SGD, "inside", "outside", "outside"),
        (spectrum(0.1, 5, 10.6, -1), SGD, "outside", "outside", "outside"),
        (spectrum(0.1, 5), USAM, "inside", "inside", "inside"),
        (spectrum(0.1, 5, -22), USAM, "inside", "inside", "inside"),
        (spectrum(0.1, 5, -22, 7.3), USAM, "at the edge", "inside", "at the edge"),
        (spectrum(0.1, 5, -19), USAM, "inside", "outside", "outside"),
        (spectrum(0.1, 5, -22, -10), USAM, "inside", "outside", "outside"),
        (spectrum(0.1, 5, -29), USAM, "inside", "outside", "outside"),
        (
            spectrum(0.1, 5),
            lambda p: ef.SGD(p, lr=0.2, weight_decay=11.0),
            "outside",
            "inside",
            "outside",
        ),
        (
            spectrum(-5, -0.1, -9.6),
            lambda p: torch.optim.SGD(p, lr=0.2, maximize=True),
            "at the edge",
            "inside",
            "at the edge",
        ),
        (spectrum(-3, 500), lambda p: ef.SGD(p, lr=0.0), "inside", "inside", "inside"),
        (
            spectrum(0.1, 5),
            lambda p: ef.HessianUSAM(p, lr=0.2, momentum=0.5, rho=0.1),
            "outside",
            "inside",
            "outside",
        ),
        (spectrum(0.1, 5), lambda p: ef.TwoStepUSAM(p, lr=0.2, rho=0.01), *["inside"] * 3),
    ],
)
def test_verdicts_where_the_spectrum_is_known(
    eigenvalues: Tensor, build: Build, upper: str, saddle: str, verdict: str
) -> None:
    task = Quadratic(eigenvalues)
    opt = build(task.parameters())
    if opt.param_groups[0]["weight_decay"]:
        with torch.no_grad():  # (H + wd) x = H 1
            decayed = eigenvalues / (eigenvalues + opt.param_groups[0]["weight_decay"])
            task.x[0].copy_(decayed)
    result = certify(task, opt)
    assert result.upper is not None
    assert result.saddle is not None
    assert (result.upper.verdict, result.saddle.verdict) == (upper, saddle)
    assert result.verdict == verdict
    assert result.needed == ()
    sign = -1 if opt.param_groups[0].get("maximize") else 1
    exact = (sign * eigenvalues).max().item()
    assert result.sharpness - 1e-9 <= exact <= result.sharpness + result.sharpness_error
    assert result.sharpness_error < 0.02 * result.bottom.value + 0.02 * 30 + 6


def test_undecided_names_the_evidence_needed() -> None:
    task = Quadratic(torch.linspace(0, 9.4, 400, dtype=torch.float64))
    opt = ef.SGD(task.parameters(), lr=0.2)
    few = certify(task, opt, max_matvecs=4)
    assert few.verdict == "undecided"
    assert few.matvecs == 4
    for _ in range(3):  # the eigenvalue may turn out to lie nearer the edge than it seemed
        [upper] = [text for text in few.needed if text.startswith("upper edge")]
        most = int(upper.split("max_matvecs=")[1].split()[0])
        few = certify(task, opt, max_matvecs=most)
        if few.verdict == "inside":
            break
    assert few.verdict == "inside"
    assert few.matvecs < 400  # and not because nothing was left


def test_the_saddle_tolerance_is_the_callers() -> None:
    task = Quadratic(spectrum(0.1, 5, -0.1))
    opt = SGD(task.parameters())
    assert certify(task, opt).verdict == "inside"
    strict = certify(task, opt, saddle_tol=0.0)
    assert strict.verdict == "outside"
    assert strict.upper is not None
    assert strict.upper.verdict == "inside"


def test_a_start_of_its_own() -> None:
    """Two certificates without a seed have different starts; with a seed the same."""
    task = Quadratic(torch.linspace(0, 9.4, 300, dtype=torch.float64))
    opt = SGD(task.parameters())
    runs = [ef.certify(task, task.loss, task.data, opt, max_matvecs=5) for _ in range(2)]
    assert runs[0].sharpness != runs[1].sharpness
    again = ef.certify(task, task.loss, task.data, opt, max_matvecs=5, seed=runs[0].seed)
    assert again.sharpness == runs[0].sharpness
