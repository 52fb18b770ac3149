"""Schedules of rho: their formulas, what a step with rho = 0 costs, and saving."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import eigenfilter as ef
from eigenfilter.schedulers import KINDS, RhoSchedule


def optimizer(rho: float | torch.Tensor = 0.2) -> ef.USAM:
    return ef.USAM([torch.nn.Parameter(torch.tensor([1.0, 2.0]))], lr=0.1, rho=rho)


def rhos(schedule: RhoSchedule, steps: int) -> list[float]:
    """rho at the steps from 0 on."""
    result = []
    for _ in range(steps):
        result.append(float(schedule.get_last_rho()[0]))
        schedule.step()
    return result


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("constant", {}, [0.2] * 6),
        ("linear", {"total_steps": 4, "end": 0.5}, [0.2, 0.175, 0.15, 0.125, 0.1, 0.1]),
        (
            "cosine",
            {"total_steps": 4},
            [0.1 + 0.1 * math.cos(math.pi * t / 4) for t in range(5)] + [0.0],
        ),
        ("step", {"every": 2, "gamma": 0.5}, [0.2, 0.2, 0.1, 0.1, 0.05, 0.05]),
        ("late", {"total_steps": 5, "start": 0.6}, [0.0, 0.0, 0.0, 0.2, 0.2, 0.2]),
        ("every", {"every": 3}, [0.2, 0.0, 0.0, 0.2, 0.0, 0.0]),
        (lambda t: t / 2, {}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_kinds(kind: Any, options: dict[str, Any], expected: list[float], tensor: bool) -> None:
    rho = torch.tensor(0.2, dtype=torch.float64) if tensor else 0.2
    opt = optimizer(rho)
    schedule = RhoSchedule(opt, kind, **options)
    assert rhos(schedule, 6) == pytest.approx(expected, abs=1e-15)
    assert (opt.param_groups[0]["rho"] is rho) == tensor


@pytest.mark.parametrize("kind", ["late", "every"])
def test_a_step_with_rho_0_costs_one_gradient(kind: str) -> None:
    opt = optimizer()
    (p,) = opt.param_groups[0]["params"]
    schedule = RhoSchedule(opt, kind, total_steps=6, start=0.5, every=2)
    calls = []

    def closure() -> torch.Tensor:
        calls[-1] += 1
        opt.zero_grad()
        loss = (p**4).sum()
        loss.backward()
        return loss

    for _ in range(6):
        calls.append(0)
        opt.step(closure)
        schedule.step()
    assert calls == ([1, 1, 1, 2, 2, 2] if kind == "late" else [2, 1, 2, 1, 2, 1])


def test_groups_keep_their_ratio_and_lr_is_left_alone() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = ef.USAM([{"params": params[:1], "rho": 0.4}, {"params": params[1:]}], lr=0.3, rho=0.1)
    schedule = RhoSchedule(opt, "linear", total_steps=2)
    lr = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    while opt.ascend():
        for p in params:
            p.grad = torch.ones_like(p)
    opt.step()
    schedule.step()
    lr.step()
    assert [g["rho"] for g in opt.param_groups] == pytest.approx([0.2, 0.05])
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.15, 0.15])


def test_saved_and_loaded_mid_run() -> None:
    first = optimizer()
    schedule = RhoSchedule(first, "linear", total_steps=10)
    rhos(schedule, 4)
    second = optimizer(rho=7.0)
    second.load_state_dict(first.state_dict())
    other = RhoSchedule(second, "linear", total_steps=10)
    other.load_state_dict(schedule.state_dict())
    assert rhos(other, 5) == rhos(schedule, 5)


OPTIONS: dict[str, Any] = {
    "total_steps": 7,
    "end": 0.3,
    "every": 3,
    "gamma": 0.4,
    "start": 0.5,
}


def halves(t: int) -> float:
    return 0.5**t


@pytest.mark.parametrize("kind", [*KINDS, halves])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda schedule: pickle.loads(pickle.dumps(schedule))]
)
def test_a_copy_goes_on_alone(kind: Any, tensor: bool, copied: Any) -> None:
    schedule = RhoSchedule(optimizer(torch.tensor(0.2) if tensor else 0.2), kind, **OPTIONS)
    rhos(schedule, 2)
    other = copied(schedule)
    before = float(schedule.get_last_rho()[0])
    ahead = rhos(other, 6)
    assert float(schedule.get_last_rho()[0]) == before
    assert rhos(schedule, 6) == ahead
    assert other.optimizer is not schedule.optimizer


@pytest.mark.parametrize("kind", [*KINDS, halves])
def test_saved_and_loaded_from_every_kind(kind: Any) -> None:
    schedule, other = (RhoSchedule(optimizer(), kind, **OPTIONS) for _ in range(2))
    rhos(schedule, 3)
    other.load_state_dict(pickle.loads(pickle.dumps(schedule.state_dict())))
    assert rhos(other, 6) == rhos(schedule, 6)


def test_a_function_without_a_name_is_copied_and_not_pickled() -> None:
    schedule = RhoSchedule(optimizer(), lambda t: 1 / (t + 1))
    assert rhos(copy.deepcopy(schedule), 3) == pytest.approx([0.2, 0.1, 0.2 / 3])
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't pickle .*lambda"):
        pickle.dumps(schedule)


def test_not_between_an_ascent_and_its_step() -> None:
    opt = optimizer()
    schedule = RhoSchedule(opt, "every", every=2)
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    opt.ascend()
    with pytest.raises(RuntimeError, match=r"call schedule.step\(\) after opt.step\(\)"):
        schedule.step()
    opt.restore()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sometimes", {}, "unknown kind 'sometimes': choose one of constant, linear"),
        ("linear", {}, '"linear" needs total_steps'),
        ("late", {"total_steps": 5}, '"late" needs start'),
        ("late", {"total_steps": 5, "start": 1.5}, '"late" needs start'),
        ("every", {"every": 0}, '"every" needs every, at least 1'),
        ("cosine", {"total_steps": 5, "end": -1.0}, "end and gamma must be at least 0"),
        (lambda t: -1.0, {}, "a factor must be at least 0"),
    ],
)
def test_bad_arguments(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RhoSchedule(optimizer(), kind, **options)


def test_an_optimizer_without_rho() -> None:
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match="SGD has groups without rho"):
        RhoSchedule(opt)
