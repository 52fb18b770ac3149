"""Schedulers of rho: their formulas, what a step with rho = 0 costs, and saving."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import eigenfilter as ef
from eigenfilter.optimizers.hyperparameters import bind_rho, rho_of
from eigenfilter.schedulers import KINDS, RhoScheduler
from test_scheduler_frameworks import imported


def optimizer(rho: float | torch.Tensor = 0.2) -> ef.USAM:
    return ef.USAM([torch.nn.Parameter(torch.tensor([1.0, 2.0]))], lr=0.1, rho=rho)


def rhos(scheduler: RhoScheduler, steps: int) -> list[float]:
    """rho at the steps from 0 on."""
    result = []
    for _ in range(steps):
        result.append(float(scheduler.get_last_rho()[0]))
        scheduler.optimizer.step()  # without gradients, which does nothing
        scheduler.step()
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
    scheduler = RhoScheduler(opt, kind, **options)
    assert rhos(scheduler, 6) == pytest.approx(expected, abs=1e-15)
    assert (opt.param_groups[0]["rho"] is rho) == tensor


@pytest.mark.parametrize("kind", ["late", "every"])
def test_a_step_with_rho_0_costs_one_gradient(kind: str) -> None:
    opt = optimizer()
    (p,) = opt.param_groups[0]["params"]
    scheduler = RhoScheduler(opt, kind, total_steps=6, start=0.5, every=2)
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
        scheduler.step()
    assert calls == ([1, 1, 1, 2, 2, 2] if kind == "late" else [2, 1, 2, 1, 2, 1])


def test_groups_keep_their_ratio_and_lr_is_left_alone() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = ef.USAM([{"params": params[:1], "rho": 0.4}, {"params": params[1:]}], lr=0.3, rho=0.1)
    scheduler = RhoScheduler(opt, "linear", total_steps=2)
    lr = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    while opt.ascend():
        for p in params:
            p.grad = torch.ones_like(p)
    opt.step()
    scheduler.step()
    lr.step()
    assert [g["rho"] for g in opt.param_groups] == pytest.approx([0.2, 0.05])
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.15, 0.15])


def test_saved_and_loaded_mid_run() -> None:
    first = optimizer()
    scheduler = RhoScheduler(first, "linear", total_steps=10)
    rhos(scheduler, 4)
    second = optimizer(rho=7.0)
    second.load_state_dict(first.state_dict())
    other = RhoScheduler(second, "linear", total_steps=10)
    other.load_state_dict(scheduler.state_dict())
    assert rhos(other, 5) == rhos(scheduler, 5)


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
    "copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))]
)
def test_a_copy_goes_on_alone(kind: Any, tensor: bool, copied: Any) -> None:
    scheduler = RhoScheduler(optimizer(torch.tensor(0.2) if tensor else 0.2), kind, **OPTIONS)
    rhos(scheduler, 2)
    other = copied(scheduler)
    before = float(scheduler.get_last_rho()[0])
    ahead = rhos(other, 6)
    assert float(scheduler.get_last_rho()[0]) == before
    assert rhos(scheduler, 6) == ahead
    assert other.optimizer is not scheduler.optimizer


@pytest.mark.parametrize("kind", [*KINDS, halves])
def test_saved_and_loaded_from_every_kind(kind: Any) -> None:
    scheduler, other = (RhoScheduler(optimizer(), kind, **OPTIONS) for _ in range(2))
    rhos(scheduler, 3)
    other.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    assert rhos(other, 6) == rhos(scheduler, 6)


def test_a_function_without_a_name_is_copied_and_not_pickled() -> None:
    scheduler = RhoScheduler(optimizer(), lambda t: 1 / (t + 1))
    assert rhos(copy.deepcopy(scheduler), 3) == pytest.approx([0.2, 0.1, 0.2 / 3])
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't pickle .*lambda"):
        pickle.dumps(scheduler)


def test_not_between_an_ascent_and_its_step() -> None:
    opt = optimizer()
    scheduler = RhoScheduler(opt, "every", every=2)
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    opt.ascend()
    with pytest.raises(RuntimeError, match=r"call scheduler.step\(\) after opt.step\(\)"):
        scheduler.step()
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
        RhoScheduler(optimizer(), kind, **options)


def test_an_optimizer_without_rho() -> None:
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match="SGD has groups without rho"):
        RhoScheduler(opt)


# rho = c lr.


def pair(lr: Any = 0.1, rho: Any = 0.05) -> ef.USAM:
    params = [torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 2 * lr, "rho": 3 * rho}]
    return ef.USAM(groups, lr=lr, rho=rho)


def take_step(opt: Any) -> list[float]:
    """Take a step; return the radius that each parameter's ascent had."""
    params = [p for group in opt.param_groups for p in group["params"]]
    x = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    radii = [0.0] * len(params)
    while opt.ascend():
        radii = [float((p.detach() - a)[0]) for p, a in zip(params, x, strict=True)]
        for p in params:
            p.grad = torch.ones_like(p)
    opt.step()
    return radii


@pytest.mark.parametrize("first", ["lr", "rho"])
@pytest.mark.parametrize("kind", ["numbers", "tensors", "tensor lr", "tensor rho"])
def test_rho_follows_lr_whichever_scheduler_is_first(first: str, kind: str) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64) if kind in ("tensors", "tensor lr") else 0.1
    rho = torch.tensor(0.05, dtype=torch.float64) if kind in ("tensors", "tensor rho") else 0.05
    opt = pair(lr, rho)
    make = [
        lambda: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6),
        lambda: RhoScheduler(opt, "lr"),
    ]
    schedulers = [f() for f in (make if first == "lr" else make[::-1])]
    for t in range(6):
        factor = (1 + math.cos(math.pi * t / 6)) / 2
        assert take_step(opt) == pytest.approx([0.05 * factor, 0.15 * factor], rel=1e-5)
        for scheduler in schedulers:
            scheduler.step()
        rho_scheduler = schedulers[first == "lr"]
        assert rho_scheduler.get_last_lr() == [g["lr"] for g in opt.param_groups]


def test_rho_of_an_unchanged_lr_is_the_initial_rho_itself() -> None:
    opt = pair(lr=0.3, rho=0.07)
    RhoScheduler(opt, "lr")
    take_step(opt)
    assert [g["rho"] for g in opt.param_groups] == [0.07, 3 * 0.07]


def test_rho_follows_lr_without_reading_tensors_and_in_place() -> None:
    """Meta tensors have no values, so reading one, which would wait for a GPU, is an error."""
    rho = torch.tensor(0.05, device="meta")
    group = {"lr": torch.tensor(0.1, device="meta"), "rho": rho, "initial_rho": rho.clone()}
    group["rho_base_lr"] = group["lr"].clone()
    bind_rho(group)
    assert rho_of(group) is rho
    assert rho._version == 2
    group["rho"] = 0.0  # by hand
    assert rho_of(group) == 0.0


def test_rho_follows_an_lr_that_was_changed_by_hand() -> None:
    opt = pair()
    RhoScheduler(opt, "lr")
    opt.param_groups[1]["lr"] = 0.05
    assert take_step(opt) == pytest.approx([0.05, 0.0375], rel=1e-5)
    for group in opt.param_groups:
        group["lr"] = 0.0
    assert opt.phase == "descent"  # a step with rho = 0 takes no ascent
    assert take_step(opt) == [0.0, 0.0]
    opt.param_groups[1]["lr"] = 0.2  # the first group still has none
    assert opt.phase == "ascent"
    assert take_step(opt) == pytest.approx([0.0, 0.15], rel=1e-5)


def test_rho_follows_lr_through_a_warmup_that_began_before() -> None:
    opt = pair()
    warmup = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.25, total_iters=3)
    scheduler = RhoScheduler(opt, "lr")
    radii = []
    for _ in range(4):
        radii.append(take_step(opt)[0])
        warmup.step()
        scheduler.step()
    assert radii == pytest.approx([0.0125, 0.025, 0.0375, 0.05], rel=1e-5)


def test_rho_follows_the_lr_of_a_group_that_is_added_later() -> None:
    opt = pair()
    scheduler = RhoScheduler(opt, "lr")
    take_step(opt)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.4, "rho": 0.2})
    scheduler.step()
    opt.param_groups[2]["lr"] = 0.1
    assert take_step(opt) == pytest.approx([0.05, 0.15, 0.05], rel=1e-5)


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_ascent_rho_follows_lr_and_the_bases_rho_stays(through: str) -> None:
    base = torch.optim.Adadelta([torch.nn.Parameter(torch.ones(2))], lr=0.5, rho=0.9)
    opt = ef.SharpnessAware(base, rho=0.2)
    RhoScheduler(opt if through == "wrapper" else base, "lr")
    base.param_groups[0]["lr"] = 0.25
    assert take_step(opt) == pytest.approx([0.1], rel=1e-5)
    assert base.param_groups[0]["rho"] == 0.9


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first"])
@pytest.mark.parametrize("kind", ["lr", "cosine"])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_resumed_run_has_the_same_bits(kind: str, order: str, tensor: bool) -> None:
    def start() -> tuple[ef.USAM, list[Any]]:
        opt = pair(rho=torch.tensor(0.05) if tensor else 0.05)
        lr = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.7)
        return opt, [lr, RhoScheduler(opt, kind, total_steps=9)]

    def go_on(opt: ef.USAM, schedulers: list[Any]) -> list[list[float]]:
        radii = []
        for _ in range(3):
            radii.append(take_step(opt))
            for scheduler in schedulers:
                scheduler.step()
        return radii

    opt, schedulers = start()
    go_on(opt, schedulers)
    saved = [pickle.loads(pickle.dumps(each.state_dict())) for each in (opt, *schedulers)]
    weights = [p.detach().clone() for g in opt.param_groups for p in g["params"]]
    other, others = start()
    for p, weight in zip(
        (p for g in other.param_groups for p in g["params"]), weights, strict=True
    ):
        p.data.copy_(weight)
    pairs = list(zip((other, *others), saved, strict=True))
    for each, state in pairs if order == "optimizer first" else pairs[::-1]:
        each.load_state_dict(state)
    assert [g["rho"] for g in other.param_groups] == [g["rho"] for g in opt.param_groups]
    assert go_on(other, others) == go_on(opt, schedulers)


def test_another_kind_ends_the_bond() -> None:
    opt = pair()
    RhoScheduler(opt, "lr")
    RhoScheduler(opt, "constant")
    opt.param_groups[0]["lr"] = 0.01
    assert take_step(opt) == pytest.approx([0.05, 0.15], rel=1e-5)
    assert not any("rho_base_lr" in group for group in opt.param_groups)


def test_an_initial_lr_of_0_has_no_ratio() -> None:
    opt = pair(lr=0.0)
    with pytest.raises(ValueError, match="an initial lr of 0 leaves c in rho = c lr undefined"):
        RhoScheduler(opt, "lr")
    assert "rho_base_lr" not in opt.param_groups[0]
    assert take_step(opt) == pytest.approx([0.05, 0.15], rel=1e-5)


# What reads rho between two steps, and what sets it.


@pytest.mark.parametrize("make", ["usam", "adamw", "wrapper"])
@pytest.mark.parametrize("tensor", [False, True])
def test_filters_read_the_rho_of_the_next_step(make: str, tensor: bool) -> None:
    rho = torch.tensor(0.05, dtype=torch.float64) if tensor else 0.05
    params = [torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.2}]
    opt: Any
    if make == "wrapper":
        opt = ef.SharpnessAware(torch.optim.SGD(groups, lr=0.1), rho=rho)
    else:
        opt = (ef.USAM if make == "usam" else ef.AdamW)(groups, lr=0.1, rho=rho)
    scheduler = RhoScheduler(opt, "lr")
    step_lr = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    take_step(opt)
    scheduler.step()
    step_lr.step()
    radii = [getattr(flt, "rho", 0.005) for flt in ef.filters.of(opt)]  # AdamW's has none
    assert radii == pytest.approx([0.005, 0.005])
    assert [float(g["rho"]) for g in opt.param_groups] == pytest.approx([0.005, 0.005])
    if make != "adamw":
        assert take_step(opt) == pytest.approx([0.005, 0.005], rel=1e-4)


def test_monitor_and_certificate_see_the_rho_of_the_next_step() -> None:
    """The edges are those of an optimizer with this lr and this rho."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False).double()
    data = (torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))
    loss_fn = torch.nn.functional.mse_loss
    op = ef.curvature.HessianOperator(model, loss_fn, [data])

    def monitored(opt: ef.USAM) -> float | None:
        return ef.SharpnessMonitor(op, opt, on_edge=lambda check: None).check().edge

    def certified(opt: ef.USAM) -> float | None:
        return ef.certify(model, loss_fn, data, opt, seed=1).edge

    opt = ef.USAM(model.parameters(), lr=0.4, rho=0.2)
    scheduler = RhoScheduler(opt, "lr")
    step_lr = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    opt.step()
    scheduler.step()
    for edge in (monitored, certified):
        step_lr.step()
        lr = opt.param_groups[0]["lr"]
        assert edge(opt) == edge(ef.USAM(model.parameters(), lr=lr, rho=lr / 2)) is not None


@pytest.mark.parametrize(
    ("tensor", "value"),
    [(False, 0.0), (False, 0.3), (True, 0.0), (True, 0.3), (True, "in place")],
)
def test_a_rho_that_is_set_by_hand_holds_until_the_scheduler_steps(
    tensor: bool, value: Any
) -> None:
    opt = pair(rho=torch.tensor(0.05) if tensor else 0.05)
    scheduler = RhoScheduler(opt, "lr")
    take_step(opt)
    if value == "in place":
        opt.param_groups[1]["rho"].fill_(0.3)
    else:
        opt.param_groups[1]["rho"] = value
    held = 0.3 if value == "in place" else value
    for _ in range(2):
        opt.param_groups[0]["lr"] /= 2
        opt.param_groups[1]["lr"] /= 2
        radii = take_step(opt)
        assert radii[1] == pytest.approx(held, rel=1e-5)
    assert radii[0] == pytest.approx(0.0125, rel=1e-5)
    scheduler.step()
    assert take_step(opt) == pytest.approx([0.0125, 0.0375], rel=1e-5)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_loaded_state_leaves_rho_to_the_hand(tensor: bool) -> None:
    """Of a run in which rho followed lr, where there is no such scheduler."""
    rho = torch.tensor(0.05) if tensor else 0.05
    opt, other = pair(rho=rho), pair(rho=rho)
    RhoScheduler(opt, "lr")
    other.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    other.param_groups[0]["rho"] = 0.5
    for _ in range(2):
        assert take_step(other) == pytest.approx([0.5, 0.15], rel=1e-5)


def test_rho_follows_again_after_an_lr_that_was_refused() -> None:
    opt = pair()
    RhoScheduler(opt, "lr")
    opt.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be at least 0"):
        take_step(opt)
    opt.param_groups[0]["lr"] = 0.05
    assert take_step(opt) == pytest.approx([0.025, 0.15], rel=1e-5)


def other_initial_lr(opt: Any, kind: str) -> None:
    if kind == "cyclic":
        torch.optim.lr_scheduler.CyclicLR(opt, base_lr=0.001, max_lr=0.1, cycle_momentum=False)
    else:
        torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=9, cycle_momentum=False)


@pytest.mark.parametrize("kind", ["cyclic", "one cycle"])
@pytest.mark.parametrize("through", ["own", "groups", "wrapper", "base", "framework"])
def test_an_initial_lr_that_is_not_the_optimizers(kind: str, through: str) -> None:
    params = [torch.nn.Parameter(torch.tensor([1.0, 2.0]))]
    base = torch.optim.SGD(params, lr=0.1)
    opt: Any = {"own": optimizer, "groups": pair}.get(through, lambda: ef.SharpnessAware(base))()
    given = base if through == "base" else opt
    if through == "framework":
        given = imported("accelerate").Accelerator(cpu=True).prepare(opt)
    other_initial_lr(given, kind)
    before = [dict(group) for group in opt.param_groups]
    with pytest.raises(ValueError, match=r"a scheduler of lr has set initial_lr to 0\.0"):
        RhoScheduler(given, "lr")
    assert [dict(group) for group in opt.param_groups] == before
    RhoScheduler(given, "constant")


@pytest.mark.parametrize("kind", ["cyclic", "one cycle"])
def test_before_a_scheduler_that_replaces_initial_lr(kind: str) -> None:
    opt = optimizer(rho=0.05)
    scheduler = RhoScheduler(opt, "lr")
    other_initial_lr(opt, kind)
    assert take_step(opt)[0] == pytest.approx(opt.param_groups[0]["lr"] / 2, rel=1e-4)
    scheduler.step()
    assert take_step(opt)[0] == pytest.approx(opt.param_groups[0]["lr"] / 2, rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.1),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5),
        lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, 0.25),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
        lambda opt: torch.optim.lr_scheduler.PolynomialLR(opt),
        lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
        lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [1, 2]),
    ],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_other_schedulers_keep_the_initial_lr(make: Any, tensor: bool) -> None:
    opt = pair(lr=torch.tensor(0.1) if tensor else 0.1)
    make(opt)
    RhoScheduler(opt, "lr")
    ratios = [
        radius / float(g["lr"]) for radius, g in zip(take_step(opt), opt.param_groups, strict=True)
    ]
    assert ratios == pytest.approx([0.5, 0.75], rel=1e-4)


def test_a_loaded_initial_lr_is_taken_as_it_is() -> None:
    opt, other = pair(lr=0.3), pair(lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(opt, 0.5)
    other.load_state_dict(opt.state_dict())
    RhoScheduler(other, "lr")
    assert take_step(other) == pytest.approx([0.025, 0.075], rel=1e-5)


@pytest.mark.parametrize("through", ["base", "framework"])
@pytest.mark.parametrize("kind", ["lr", "constant"])
def test_not_in_mid_step_through_another_optimizer(through: str, kind: str) -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    base = torch.optim.SGD([p], lr=0.1)
    opt = ef.SharpnessAware(base, rho=0.2)
    given: Any = base
    if through == "framework":
        given = imported("accelerate").Accelerator(cpu=True).prepare(opt)
    scheduler = RhoScheduler(given, kind)
    p.grad = torch.ones_like(p)
    opt.ascend()
    for act in (scheduler.step, lambda: scheduler.load_state_dict({"last_epoch": 2})):
        with pytest.raises(RuntimeError, match=r"call scheduler.step\(\) after opt.step\(\)"):
            act()
    with pytest.raises(RuntimeError, match="rho changes between steps"):
        RhoScheduler(given, kind)
    p.grad = torch.ones_like(p)
    (opt if through == "base" else given).step()
    scheduler.step()


@pytest.mark.parametrize("start", [0.07, 0.14, 0.28, 0.29, 0.55, 0.57, 0.58, 0.0, 1.0])
def test_late_begins_at_the_step_that_is_meant(start: float) -> None:
    opt = optimizer()
    scheduler = RhoScheduler(opt, "late", total_steps=100, start=start)
    first = rhos(scheduler, 101).index(0.2)
    assert first == round(100 * start)


# With torch's schedulers.


def test_it_is_a_scheduler_of_torch() -> None:
    opt = pair(lr=torch.tensor(0.1))
    scheduler = RhoScheduler(opt, "linear", total_steps=4)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert (scheduler.last_epoch, scheduler._step_count) == (0, 1)
    take_step(opt)
    scheduler.step()
    assert (scheduler.last_epoch, scheduler._step_count) == (1, 2)
    opt.param_groups[0]["lr"].fill_(0.02)
    for values in (scheduler.get_last_lr(), scheduler.get_lr()):
        assert values == [torch.tensor(0.02), torch.tensor(0.2)]
        values[0].fill_(7.0)
    assert opt.param_groups[0]["lr"] == torch.tensor(0.02)
    assert scheduler.state_dict() == {"last_epoch": 1, "_step_count": 2}


def test_torch_warns_of_a_scheduler_that_steps_first() -> None:
    """And of nothing else: every other test would raise, because warnings are errors."""
    scheduler = RhoScheduler(pair(), "linear", total_steps=4)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_the_deprecated_epoch() -> None:
    opt = pair()
    scheduler = RhoScheduler(opt, "linear", total_steps=4)
    opt.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(3)
    assert scheduler.get_last_rho() == pytest.approx([0.0125, 0.0375])


def test_one_after_the_other() -> None:
    """`SequentialLR` begins each scheduler at its milestone."""
    opt = pair()
    parts = [
        RhoScheduler(opt, "every", every=2),
        RhoScheduler(opt, "linear", total_steps=2),
        RhoScheduler(opt, "lr"),
    ]
    sequence = torch.optim.lr_scheduler.SequentialLR(opt, parts, milestones=[3, 5])
    lr = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.5, total_iters=6)
    radii, lrs = [], []
    for _ in range(7):
        radii.append(take_step(opt)[0])
        lrs.append(opt.param_groups[0]["lr"])
        lr.step()
        sequence.step()
    assert lrs == pytest.approx([0.05 + 0.05 * t / 6 for t in range(7)])
    expected = [0.05, 0.0, 0.05, 0.05, 0.025, lrs[5] / 2, lrs[6] / 2]
    assert radii == pytest.approx(expected, rel=1e-5)
    assert sequence.get_last_lr() == pytest.approx([0.1, 0.2])


def test_after_a_warmup_of_lr_in_one_sequence() -> None:
    opt = pair()
    warmup = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.5, total_iters=2)
    parts = [warmup, RhoScheduler(opt, "step", every=1, gamma=0.5)]
    sequence = torch.optim.lr_scheduler.SequentialLR(opt, parts, milestones=[3])
    seen = []
    for _ in range(6):
        radius = take_step(opt)[0]
        seen.append((opt.param_groups[0]["lr"], radius))
        sequence.step()
    lrs, radii = zip(*seen, strict=True)
    assert lrs == pytest.approx((0.05, 0.075, 0.1, 0.1, 0.1, 0.1))
    assert radii == pytest.approx((0.05, 0.05, 0.05, 0.05, 0.025, 0.0125), rel=1e-5)


@pytest.mark.parametrize("first", ["lr", "rho"])
def test_chained_with_a_scheduler_of_lr(first: str) -> None:
    opt = pair()
    schedulers: list[Any] = [
        torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5),
        RhoScheduler(opt, "linear", total_steps=4),
    ]
    chained = torch.optim.lr_scheduler.ChainedScheduler(
        schedulers if first == "lr" else schedulers[::-1]
    )
    for t in range(3):
        assert take_step(opt)[0] == pytest.approx(0.05 * (1 - t / 4), rel=1e-5)
        assert chained.get_last_lr() == pytest.approx([0.1 * 0.5**t, 0.2 * 0.5**t])
        chained.step()
    saved = pickle.loads(pickle.dumps(chained.state_dict()))
    take_step(opt)
    chained.step()
    chained.load_state_dict(saved)
    assert [s.last_epoch for s in schedulers] == [3, 3]
    assert opt.param_groups[0]["rho"] == pytest.approx(0.0125)


@pytest.mark.parametrize("explicit", [False, True])
def test_the_wrapped_step_is_the_optimizers(explicit: bool) -> None:
    """Schedulers replace `opt.step`; the steps stay the same, bit for bit."""

    def weights(scheduled: bool) -> list[torch.Tensor]:
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        opt = ef.SharpnessAware(torch.optim.Adam([p], lr=0.1), "sam", rho=0.1)
        if scheduled:
            RhoScheduler(opt, "constant")
            torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = (p**4).sum()
            loss.backward()
            return loss

        for _ in range(3):
            if explicit:
                closure()
                while opt.ascend():
                    closure()
                opt.step()
            else:
                opt.step(closure)
        return [p.detach()]

    assert torch.equal(weights(True)[0], weights(False)[0])


def test_resumed_by_its_constructor() -> None:
    opt = pair()
    scheduler = RhoScheduler(opt, "linear", total_steps=10)
    rhos(scheduler, 4)
    other = pair()
    other.load_state_dict(opt.state_dict())
    resumed = RhoScheduler(other, "linear", total_steps=10, last_epoch=3)
    assert resumed.last_epoch == 4
    assert resumed.get_last_rho() == scheduler.get_last_rho()
    with pytest.raises(KeyError, match="'initial_rho' is not in param_groups"):
        RhoScheduler(pair(), "linear", total_steps=10, last_epoch=3)


@pytest.mark.parametrize("state", [{}, {"last_epoch": -1}, {"last_epoch": "3"}, {"step": 4}])
def test_a_state_of_something_else(state: dict[str, Any]) -> None:
    opt = pair()
    scheduler = RhoScheduler(opt, "linear", total_steps=4)
    rhos(scheduler, 2)
    with pytest.raises(ValueError, match="has a last_epoch of at least 0"):
        scheduler.load_state_dict(state)
    assert scheduler.last_epoch == 2


def test_a_bad_factor_leaves_the_step_and_rho() -> None:
    opt = pair()
    scheduler = RhoScheduler(opt, lambda t: 1.0 if t < 2 else math.nan)
    rhos(scheduler, 1)
    opt.step()
    with pytest.raises(ValueError, match="at 2 it is nan"):
        scheduler.step()
    assert scheduler.last_epoch == 1
    assert scheduler.get_last_rho() == pytest.approx([0.05, 0.15])
