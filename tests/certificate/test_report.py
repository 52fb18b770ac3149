"""The report of certify, its side effects and its errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef
from certificate.tasks import SGD, USAM, Network, certify, spectrum
from quadratics import Quadratic


def test_the_model_does_not_change() -> None:
    task = Network()
    opt = ef.HessianUSAM(task.model.parameters(), lr=0.1, rho=0.01, momentum=0.5)
    task.step(opt, 3)
    task.closure(opt)
    params = list(task.model.parameters())
    before = [(p.detach().clone(), p._version, p.grad, p.grad.clone()) for p in params]  # type: ignore[union-attr]
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in params]
    state = torch.get_rng_state()
    task.certify(opt)
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training
    for p, (value, version, grad, copy) in zip(params, before, strict=True):
        assert torch.equal(p, value)
        assert p._version == version
        assert p.grad is grad
        assert torch.equal(grad, copy)
    for p, buffer in zip(params, buffers, strict=True):
        assert torch.equal(opt.state[p]["momentum_buffer"], buffer)


def test_parameters_outside_the_optimizer_do_not_count() -> None:
    task = Network()
    opt = ef.SGD(task.model[2].parameters(), lr=0.1)
    result = task.certify(opt, equilibrium_tol=1e9)
    assert result.parameters == 12
    H = task.dense()[-12:, -12:]
    assert result.sharpness == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-6)


def test_text_and_json() -> None:
    task = Quadratic(spectrum(0.1, 5, -22))
    result = certify(task, USAM(task.parameters()))
    text = str(result)
    assert text.splitlines()[0].split() == ["verdict", "inside"]
    assert "[-27.3205, -20] and [0, 7.32051]" in text
    read = json.loads(result.to_json())
    assert read == result.to_dict()
    assert read["saddle"]["verdict"] == "inside"
    assert read["matvecs"] == result.matvecs
    nothing = certify(task, ef.SGD(task.parameters(), lr=0.0))
    assert json.loads(nothing.to_json())["edge"] is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"edge_tol": 1.0}, "edge_tol"),
        ({"saddle_tol": -0.1}, "saddle_tol"),
        ({"tol": 0.0}, "tol"),
        ({"equilibrium_tol": -1.0}, "equilibrium_tol"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"max_matvecs": 0}, "max_matvecs"),
        ({"params": []}, "params"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    task = Quadratic(spectrum(0.1, 5))
    with pytest.raises(ValueError, match=match):
        certify(task, SGD(task.parameters()), **options)


def test_optimizers_without_a_filter() -> None:
    task = Quadratic(spectrum(0.1, 5))
    with pytest.raises(TypeError, match="no filter is known for RMSprop"):
        certify(task, torch.optim.RMSprop(task.parameters()))
    with pytest.raises(TypeError, match="ASAM"):
        certify(task, ef.SAM(task.parameters(), adaptive=True))
    with pytest.raises(ValueError, match="not a parameter of the model"):
        certify(task, SGD([nn.Parameter(torch.ones(3, dtype=torch.float64))]))


def test_a_perturbed_model_raises() -> None:
    task = Network()
    opt = ef.USAM(task.model.parameters(), lr=0.1, rho=0.05)
    task.closure(opt)
    assert opt.ascend()
    with pytest.raises(RuntimeError, match="restore"):
        task.certify(opt)
    opt.restore()
