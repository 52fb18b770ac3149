"""The certificate of SAM, whose edge depends on the norm of the gradient."""

from __future__ import annotations

import pytest

import eigenfilter as ef
from certificate.tasks import certify, spectrum
from eigenfilter import filters
from quadratics import Quadratic


def test_sams_edge_is_that_of_the_gradient_there() -> None:
    task = Quadratic(spectrum(0.1, 5))
    task.move(0.1)
    opt = ef.SAM(task.parameters(), lr=0.2, rho=0.1)
    result = certify(task, opt, equilibrium_tol=1e9)
    flt = filters.SAM(0.2, rho=0.1, grad_norm=result.gradient_norm)
    assert result.edge == pytest.approx(flt.max_eigenvalue())
    assert any("moves with it" in note for note in result.notes)
    with_norm = certify(task, opt, equilibrium_tol=1e9, grad_norm=3.0)
    assert with_norm.edge == pytest.approx(
        filters.SAM(0.2, rho=0.1, grad_norm=3.0).max_eigenvalue()
    )


def test_sam_at_a_gradient_of_zero_is_undecided() -> None:
    task = Quadratic(spectrum(0.1, 5))
    result = certify(task, ef.SAM(task.parameters(), lr=0.2, rho=0.1))
    assert result.verdict == "undecided"
    assert "grad_norm" in result.needed[0]
