"""What the monitor does at the edge of optimizers that look ahead, or back, along their update."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import eigenfilter as ef
from eigenfilter import filters
from eigenfilter.monitor import _lr_factor
from trained import Trained


@given(
    st.floats(0.0, 0.95),
    st.floats(0.0, 1.9),
    st.floats(-2.0, 5.0),
    st.floats(1.001, 1000.0),
)
def test_the_factor_puts_adamws_edge_where_it_should_be(
    beta: float, decay: float, e: float, ratio: float
) -> None:
    """Whichever multipliers decide, before and after."""
    flt = filters.AdamW(0.3, beta, decay / 0.3, 0.3 * e)
    edge = ratio * flt.max_eigenvalue()
    assume(edge > 1e-9)  # none is left at lr wd = 2
    f = _lr_factor(flt, edge)
    assert 0.0 < f < 1.0
    lowered = filters.AdamW(0.3 * f, beta, decay / 0.3, 0.3 * e * f)
    assert lowered.max_eigenvalue() == pytest.approx(edge)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("e", [-0.1, -0.04, 3.0])
def test_it_lowers_the_lr_of_adamw(e: float, decay: float) -> None:
    """By e and wd in units of lr = 1, with an edge at half of the sharpness."""
    task = Trained()
    opt = ef.AdamW(task.model.parameters(), lr=1e-3, extrapolation=1e-3 * e)
    task.train(opt, ef.SharpnessMonitor(task.op, opt, every=2), 1)
    sharpness = ef.SharpnessMonitor(task.op, opt).check().sharpness
    lr = filters.AdamW(1.0, 0.9, decay, e).max_eigenvalue() / (0.5 * sharpness)
    [group] = opt.param_groups
    group.update(lr=lr, weight_decay=decay / lr, extrapolation=e * lr)
    check = ef.SharpnessMonitor(task.op, opt, on_edge="lower_lr").check()
    [flt] = filters.of(opt)
    assert check.edge == pytest.approx(0.5 * sharpness)
    assert flt.max_eigenvalue() == pytest.approx(1.05 * check.sharpness)
    assert group["extrapolation"] == pytest.approx(e * group["lr"])


def msam(task: Trained, groups: int = 1) -> Any:
    """MSAM with an edge at half of the sharpness, by its lr and its rho alike."""
    every = list(task.model.parameters())
    parts = [every] if groups == 1 else [every[:2], every[2:]]
    opt = ef.MSAM([{"params": p} for p in parts], lr=1e-4, momentum=0.5, rho=0.01)
    task.train(opt, ef.SharpnessMonitor(task.op, opt, every=9), 3)
    for i, group in enumerate(opt.param_groups):
        lr = 3.0 / task.sharpness() / (1 + 0.1 * i)
        group.update(lr=lr, rho=0.5 * lr * float(group["momentum_norm"]))
    return opt


@pytest.mark.parametrize("groups", [1, 2])
def test_it_lowers_the_lr_and_the_rho_of_msam(groups: int) -> None:
    """Also where groups differ, whose edge is 2 in their composed matrix."""
    task = Trained()
    opt = msam(task, groups)
    before = [(group["lr"], group["rho"]) for group in opt.param_groups]
    check = ef.SharpnessMonitor(task.op, opt, on_edge="lower_lr").check()
    assert check.past_edge
    after = ef.SharpnessMonitor(task.op, opt).check()
    # The edge rises, or the composed matrix falls, to the ratio that is wanted.
    assert after.edge / after.sharpness == pytest.approx(1.05, rel=1e-3)
    factors = [group["lr"] / lr for group, (lr, _) in zip(opt.param_groups, before, strict=True)]
    rhos = [group["rho"] / rho for group, (_, rho) in zip(opt.param_groups, before, strict=True)]
    assert factors == pytest.approx(rhos)


def test_msams_rho_that_follows_lr_is_lowered_once() -> None:
    task = Trained()
    opt = msam(task)
    ef.schedulers.RhoScheduler(opt, "lr")
    [group] = opt.param_groups
    ratio = group["rho"] / group["lr"]
    check = ef.SharpnessMonitor(task.op, opt, on_edge="lower_lr").check()
    [flt] = filters.of(opt)
    assert flt.max_eigenvalue() == pytest.approx(1.05 * check.sharpness)
    assert group["rho"] / group["lr"] == pytest.approx(ratio)
    group["lr"] *= 0.5
    filters.of(opt)
    assert group["rho"] / group["lr"] == pytest.approx(ratio)


def test_it_raises_the_rho_of_msam_from_its_first_step_on() -> None:
    task = Trained()
    opt = ef.MSAM(task.model.parameters(), lr=4 / task.sharpness(), momentum=0.5, rho=0.01)
    monitor = ef.SharpnessMonitor(task.op, opt, on_edge="raise_rho")
    assert monitor.check().edge is None
    task.train(opt, ef.SharpnessMonitor(task.op, opt, every=9), 1)
    [group] = opt.param_groups
    group["rho"] = float(group["momentum_norm"])
    check = monitor.check()
    [flt] = filters.of(opt)
    assert check.past_edge
    assert flt.max_eigenvalue() == pytest.approx(check.edge / 1.05)


def test_msam_whose_filter_turns_out_to_have_no_rho() -> None:
    """The groups differ, which shows with their filters."""
    task = Trained()
    first, *rest = task.model.parameters()
    groups = [{"params": [first], "lr": 0.1}, {"params": rest}]
    opt = ef.MSAM(groups, lr=1e-3, momentum=0.5, rho=0.01)
    monitor = ef.SharpnessMonitor(task.op, opt, on_edge="raise_rho")
    task.train(opt, ef.SharpnessMonitor(task.op, opt, every=9), 1)
    with pytest.raises(ValueError, match="HessianUSAM or MSAM, with groups that are alike"):
        monitor.check()
    assert not monitor.history
    ef.schedulers.RhoScheduler(opt, "lr")
    with pytest.raises(ValueError, match="computes from lr at every step"):
        ef.SharpnessMonitor(task.op, opt, on_edge="raise_rho")


@pytest.mark.parametrize("build", [ef.SAM, ef.AdamW, lambda p: ef.MSAM(p, rho=0.0)])
def test_no_rho_to_raise(build: Any) -> None:
    task = Trained()
    with pytest.raises(ValueError, match="needs an optimizer whose filter has a rho"):
        ef.SharpnessMonitor(task.op, build(task.model.parameters()), on_edge="raise_rho")
