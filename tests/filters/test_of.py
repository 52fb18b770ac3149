"""`of` reads live optimizers: torch.optim.SGD, and those of eigenfilter by their method."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eigenfilter as ef
from eigenfilter.filters import SAM, USAM, Filter, HeavyBall, Nesterov, of

GROUP = {
    "lr": 0.3,
    "momentum": 0.8,
    "dampening": 0.2,
    "weight_decay": 0.1,
    "nesterov": False,
    "maximize": False,
}


def optimizer(method: object, *groups: dict[str, object]) -> SimpleNamespace:
    """A stand-in for an optimizer of eigenfilter: a class with a method, and groups."""
    return type("Stated", (SimpleNamespace,), {"method": method})(param_groups=list(groups))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"maximize": True}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "maximize": True}),
        (ef.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        (ef.SGD, {"momentum": 0.8, "nesterov": True, "maximize": True}),
        (ef.USAM, {"rho": 0.05}),
        (ef.USAM, {"rho": 0.05, "maximize": True}),
        (ef.USAM, {"rho": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        (ef.USAM, {"rho": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
        (ef.USAM, {"rho": 0.0, "momentum": 0.8}),
        (ef.TwoStepUSAM, {"rho": 0.1, "ascent": "anchored", "momentum": 0.8}),
        (ef.TwoStepUSAM, {"rho": 0.1, "ascent": "anchored", "maximize": True}),
        (
            ef.TwoStepUSAM,
            {"rho": 0.1, "ascent": "sequential", "momentum": 0.8, "weight_decay": 1.0},
        ),
        (ef.HessianUSAM, {"rho": 0.01, "momentum": 0.8, "dampening": 0.3}),
        (ef.HessianUSAM, {"rho": 0.01, "maximize": True, "weight_decay": 0.1}),
    ],
    ids=repr,
)
def test_a_trained_quadratic_obeys_its_filter(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """Every edge of every interval, on a Hessian with an eigenvalue on each side of it."""
    x = torch.empty(0, dtype=torch.float64, requires_grad=True)
    intervals = of(kind([x], lr=0.2, **options))[0].intervals()
    step = 0.02 * min(high - low for low, high in intervals)
    inside = [end for low, high in intervals for end in (low + step, high - step)]
    outside = [end for low, high in intervals for end in (low - step, high + step)]
    two = (kind is ef.USAM and options["rho"] > 0) or "sequential" in options.values()
    assert len(intervals) == (2 if two else 1)
    lam = torch.tensor(inside + outside, dtype=torch.float64)
    x = torch.ones_like(lam, requires_grad=True)
    opt = kind([x], lr=0.2, **options)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = 0.5 * (lam * x * x).sum()
        loss.backward()
        return loss

    for _ in range(500):
        opt.step(closure)
    size = x.detach().abs()
    assert size[: len(inside)].max() < 1e-2
    assert size[len(inside) :].min() > 1e2


def test_one_filter_per_group_at_present_values() -> None:
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    opt = torch.optim.SGD(
        [{"params": [x]}, {"params": [y], "momentum": 0.5, "nesterov": True}], lr=torch.tensor(0.25)
    )
    assert of(opt) == [HeavyBall(0.25), Nesterov(0.25, 0.5)]
    opt.param_groups[0]["lr"] = 0.125
    assert of(opt)[0].max_eigenvalue() == 16.0


def test_subclasses_of_torch_sgd_are_recognized() -> None:
    class Mine(torch.optim.SGD):
        pass

    assert of(Mine([torch.zeros(1, requires_grad=True)], lr=0.5)) == [HeavyBall(0.5)]


@pytest.mark.parametrize(
    ("method", "changed", "expected"),
    [
        ("sgd", {}, HeavyBall(0.3, 0.8, 0.2, 0.1)),
        ("sgd", {"nesterov": True, "dampening": 0}, Nesterov(0.3, 0.8, 0, 0.1)),
        ("sgd", {"maximize": True}, HeavyBall(0.3, 0.8, 0.2, 0.1, maximize=True)),
        ("usam", {"rho": 0.05}, USAM(0.3, 0.8, 0.2, 0.1, rho=0.05)),
        (
            "usam",
            {"rho": 0.05, "maximize": True},
            USAM(0.3, 0.8, 0.2, 0.1, rho=0.05, maximize=True),
        ),
        (
            "usam",
            {"rho": torch.tensor(0.25), "nesterov": True, "dampening": 0},
            USAM(0.3, 0.8, 0, 0.1, rho=0.25, nesterov=True),
        ),
        ("usam", {"rho": 0.0}, HeavyBall(0.3, 0.8, 0.2, 0.1)),
        ("usam", {"rho": 0.0, "nesterov": True, "dampening": 0}, Nesterov(0.3, 0.8, 0, 0.1)),
    ],
)
def test_eigenfilter_optimizers_by_their_method(
    method: str, changed: dict[str, object], expected: Filter
) -> None:
    assert of(optimizer(method, GROUP | changed, GROUP | changed)) == [expected] * 2


@pytest.mark.parametrize("method", ["adamw", None, property(lambda self: "sgd")])
def test_an_unknown_optimizer_is_told_what_is_supported(method: object) -> None:
    with pytest.raises(TypeError, match=r"Stated; supported are .*SGD, .*'sgd', .*'usam'"):
        of(optimizer(method, GROUP))


def test_sam_at_a_gradient_norm() -> None:
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
    opt = ef.SAM([{"params": [x], "rho": 0.1}, {"params": [y], "rho": 0.0}], lr=0.5, momentum=0.3)
    expected = [SAM(0.5, 0.3, rho=0.1, grad_norm=2.0), HeavyBall(0.5, 0.3)]
    assert of(opt, grad_norm=2.0) == expected
    with pytest.raises(TypeError, match="ASAM"):
        of(ef.SAM([x], adaptive=True), grad_norm=2.0)


def test_sam_asks_for_a_gradient_norm() -> None:
    opt = ef.SAM([torch.zeros(1, requires_grad=True)], lr=0.5)
    with pytest.raises(TypeError, match=r"use filters.SAM\(lr, ..., rho=rho, grad_norm=norm\)"):
        of(opt)


def test_an_instance_attribute_does_not_count() -> None:
    opt = torch.optim.RAdam([torch.zeros(1, requires_grad=True)])
    opt.method = "usam"
    with pytest.raises(TypeError, match="no filter is known for RAdam"):
        of(opt)


@pytest.mark.parametrize("changed", [{"lr": -1.0}, {"lr": math.nan}, {"momentum": 1.5}])
def test_bad_values_in_a_group(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        of(optimizer("sgd", GROUP | changed))


@pytest.mark.parametrize(
    ("method", "own", "options"),
    [
        ("usam", ef.USAM, {}),
        ("two_step_usam", ef.TwoStepUSAM, {"ascent": "anchored"}),
        ("hessian_usam", ef.HessianUSAM, {}),
        ("sam", ef.SAM, {}),
    ],
)
def test_a_wrapped_sgd_is_the_method_itself(
    method: str, own: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    x = torch.zeros(1, requires_grad=True)
    rest = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.2}
    wrapped = ef.SharpnessAware(torch.optim.SGD([x], **rest), method, rho=0.3, **options)
    expected = of(own([x], rho=0.3, **rest, **options), grad_norm=2.0)
    assert of(wrapped, grad_norm=2.0) == expected
    assert expected[0].max_eigenvalue() < HeavyBall(0.1, 0.6).max_eigenvalue()


def test_other_wrapped_optimizers() -> None:
    x = torch.zeros(1, requires_grad=True)
    adamw = torch.optim.AdamW([x], lr=0.1, betas=(0.7, 0.9))
    assert of(ef.SharpnessAware(adamw, rho=0.3)) == of(adamw)
    with pytest.raises(TypeError, match="no filter is known for SharpnessAware"):
        of(ef.SharpnessAware(torch.optim.RAdam([x]), rho=0.3))
    with pytest.raises(TypeError, match="ASAM"):
        of(ef.SharpnessAware(torch.optim.SGD([x]), "sam", adaptive=True), grad_norm=1.0)


def test_adam_without_decay_is_adamw() -> None:
    x = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([x], lr=0.1, betas=(0.7, 0.9))
    assert of(adam) == of(torch.optim.AdamW([x], lr=0.1, betas=(0.7, 0.9), weight_decay=0.0))
    with pytest.raises(TypeError, match="use AdamW"):
        of(torch.optim.Adam([x], weight_decay=0.1))
