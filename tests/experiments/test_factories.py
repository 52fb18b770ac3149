"""Factories of losses, optimizers and schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import eigenfilter as ef
from eigenfilter.experiments import factories
from eigenfilter.experiments.config import Config


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def rates(config: Config, steps_per_epoch: int, name: str = "lr") -> list[float]:
    """Return lr or rho at every step."""
    optimizer = factories.build_optimizer(config, parameters())
    lr = factories.lr_schedule(config, optimizer, steps_per_epoch)
    rho = factories.rho_schedule(config, optimizer, steps_per_epoch)
    assert rho is not None
    values = []
    for _ in range(config.epochs * steps_per_epoch):
        values.append(optimizer.param_groups[0][name])
        optimizer.step(lambda: sum(p.square().sum() for p in parameters()).backward())
        lr.step()
        rho.step()
    return values


@pytest.fixture(autouse=True)
def steps_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the optimizer's step, so that only the schedules act."""
    monkeypatch.setattr(ef.USAM, "step", lambda self, closure=None: None)


def test_losses() -> None:
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    smoothed = factories.build_loss(Config(label_smoothing=0.2))(scores, labels)
    target = 0.8 * F.one_hot(labels, 4) + 0.2 / 4
    expected = -(target * scores.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(smoothed, expected)
    square = factories.build_loss(Config(loss="square"))(scores, labels)
    torch.testing.assert_close(square, ((scores - F.one_hot(labels, 4)) ** 2).sum() / 6)


SETTINGS: dict[str, Any] = {"lr": 0.2, "momentum": 0.6, "weight_decay": 0.01, "rho": 0.03}


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("sgd", ef.SGD, {"nesterov": True}),
        ("sgd", ef.SGD, {"extrapolation": 0.02}),
        ("usam", ef.USAM, {}),
        ("sam", ef.SAM, {}),
        ("asam", ef.SAM, {}),
        ("two_step_usam", ef.TwoStepUSAM, {"ascent": "anchored"}),
        ("hessian_usam", ef.HessianUSAM, {"hvp": "autograd"}),
        ("hessian_usam", ef.HessianUSAM, {"fd_step": 0.01}),
    ],
)
def test_optimizers(name: str, kind: type, more: dict[str, Any]) -> None:
    optimizer = factories.build_optimizer(Config(optimizer=name, **SETTINGS, **more), parameters())
    assert type(optimizer) is kind
    [group] = optimizer.param_groups
    expected = SETTINGS | {"nesterov": False} | (more if name == "sgd" else {})
    if name == "sgd":
        del expected["rho"]
    assert {key: group[key] for key in expected} == expected
    assert (name == "asam") == getattr(optimizer.perturbation, "adaptive", False)
    if name == "two_step_usam":
        assert optimizer.ascent == "anchored"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_bits(name: str) -> None:
    [p] = params = parameters()
    optimizer = factories.build_optimizer(Config(optimizer=name, state_bits=8), params)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {t.dtype for t in optimizer.state[p].values()} >= {torch.int8}


@pytest.mark.parametrize("method", ["none", "usam", "sam", "asam", "two_step_usam", "hessian_usam"])
@pytest.mark.parametrize("name", ["adamw", "torch.optim.RMSprop", "torch.optim.SGD"])
def test_any_ascent_with_any_base(name: str, method: str) -> None:
    ahead = 0.02 if name == "adamw" else 0.0
    options = SETTINGS | {"beta1": 0.8, "beta2": 0.95, "extrapolation": ahead}
    config = Config(optimizer=name, method=method, **options)
    optimizer = factories.build_optimizer(config, parameters())
    [group] = optimizer.param_groups
    assert group["rho"] == (0.0 if method == "none" else 0.03)
    assert group["lr"] == 0.2
    assert group["weight_decay"] == 0.01
    if name == "adamw":
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["extrapolation"] == 0.02
    else:
        assert type(factories.base_of(optimizer)).__name__ == name.removeprefix("torch.optim.")
        assert group["momentum"] == 0.6
    if method not in ("none", "asam"):
        assert optimizer.perturbation.method == method


@pytest.mark.parametrize("name", ["LBFGS", "Nope", "lr_scheduler", "Optimizer"])
def test_unknown_optimizers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not an optimizer that train supports"):
        factories.build_optimizer(Config(optimizer=f"torch.optim.{name}"), parameters())


def test_hyperparameters_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="nesterov needs momentum"):
        factories.build_optimizer(Config(nesterov=True, momentum=0), parameters())
    config = Config(optimizer="hessian_usam", hvp="autograd", fd_step=0.1)
    with pytest.raises(ValueError, match="fd_step belongs to"):
        factories.build_optimizer(config, parameters())


def test_lr_schedules() -> None:
    common = {"lr": 2.0, "epochs": 4, "warmup": 0.5}
    rise = [2.0 * t / 5 for t in range(1, 6)]  # 5 of 40 steps
    s = [t / 35 for t in range(35)]
    assert rates(Config(lr_schedule="constant", **common), 10) == pytest.approx(rise + 35 * [2.0])
    linear = Config(lr_schedule="linear", lr_end=0.2, **common)
    assert rates(linear, 10) == pytest.approx(rise + [2.0 * (1 - 0.8 * u) for u in s])
    cosine = Config(lr_schedule="cosine", lr_end=0.1, **common)
    expected = [2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * u))) for u in s]
    assert rates(cosine, 10) == pytest.approx(rise + expected)
    step = Config(lr_schedule="step", lr_every=2, lr_gamma=0.5, **common)
    assert rates(step, 10) == pytest.approx(rise + 15 * [2.0] + 20 * [1.0])


def test_rho_schedules() -> None:
    late = Config(rho=0.3, rho_schedule="late", rho_start=0.75, epochs=2)
    assert rates(late, 4, "rho") == [0.0] * 6 + [0.3] * 2
    every = Config(rho=0.3, rho_schedule="every", rho_every=3, epochs=2)
    assert rates(every, 3, "rho") == [0.3, 0.0, 0.0] * 2
    follows = Config(lr=0.5, rho=0.3, rho_schedule="lr", lr_end=0.1, warmup=1, epochs=2)
    expected = [0.6 * lr for lr in rates(follows, 4, "lr")]
    assert rates(follows, 4, "rho") == pytest.approx(expected)


def test_a_warm_up_that_is_too_long() -> None:
    optimizer = factories.build_optimizer(Config(), parameters())
    with pytest.raises(ValueError, match="warmup takes 11 epochs, and training has 10"):
        factories.lr_schedule(Config(warmup=11), optimizer, 3)
