"""skip_nonfinite: a gradient that is not finite, in any phase, leaves x and state as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import SETTINGS, closure_of, distance, parameters, snapshot

HEAVY = SETTINGS["heavy ball"]
BAD = [torch.inf, -torch.inf, torch.nan]


class Spoiler:
    """A closure that spoils one element of one gradient in chosen calls, counted from 0."""

    def __init__(self, opt: torch.optim.Optimizer, params: list, bad: float, calls: set[int]):
        self.closure = closure_of(opt, params)
        self.params, self.bad, self.bad_calls = params, bad, calls
        self.calls = 0

    def __call__(self) -> Tensor:
        loss = self.closure()
        if self.calls in self.bad_calls:
            self.params[3].grad[1, 2] = self.bad
        self.calls += 1
        return loss


def momenta(opt: torch.optim.Optimizer, params: list) -> list[Tensor]:
    return snapshot([opt.state[p]["momentum_buffer"] for p in params])


def optimizer(params: list, **changes: object) -> ef.USAM:
    """Two groups, so that a bad gradient in one has to stop the other too."""
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    return ef.USAM(groups, **HEAVY | {"rho": RHO, "skip_nonfinite": True} | changes)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", [2, 3], ids=["ascent", "descent"])
def test_a_skipped_step_leaves_every_bit(dtype: torch.dtype, bad: float, call: int) -> None:
    params = parameters(dtype)
    opt = optimizer(params)
    closure = Spoiler(opt, params, bad, {call})
    opt.step(closure)
    before, momenta_before = snapshot(params), momenta(opt, params)
    assert opt.skipped == 0
    loss = opt.step(closure)
    assert loss.isfinite()
    assert opt.skipped == 1
    assert not opt.perturbed
    assert all(map(same_bits, params, before))
    assert all(map(same_bits, momenta(opt, params), momenta_before))
    opt.step(closure)
    assert opt.skipped == 1
    assert distance(params, before) > 1e-3


def test_an_ascent_that_overflows_does_not_move() -> None:
    params = parameters()
    opt = optimizer(params)
    closure = Spoiler(opt, params, torch.nan, {0})
    before = snapshot(params)
    closure()
    assert opt.ascend()
    assert all(map(same_bits, params, before))
    closure()
    opt.step()
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))


@pytest.mark.parametrize("calls", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_the_first_step_is_undamped_even_if_one_before_it_was_skipped(
    calls: set[int], dampening: float
) -> None:
    results = []
    for bad_calls in (calls, set()):
        params = parameters()
        opt = optimizer(params, dampening=dampening)
        closure = Spoiler(opt, params, torch.inf, bad_calls)
        for _ in range(4 if bad_calls else 3):
            opt.step(closure)
        assert opt.skipped == bool(bad_calls)
        results.append((params, momenta(opt, params)))
    (x, m), (expected_x, expected_m) = results
    assert all(map(same_bits, x, expected_x))
    assert all(map(same_bits, m, expected_m))


def test_sgd_skips_too() -> None:
    results = []
    for bad_calls in ({0, 2}, set()):
        params = parameters()
        opt = ef.SGD(params, **HEAVY, skip_nonfinite=True)
        closure = Spoiler(opt, params, torch.nan, bad_calls)
        for _ in range(3 + len(bad_calls)):
            opt.step(closure)
        assert opt.skipped == len(bad_calls)
        results.append(params)
    assert all(map(same_bits, *results))


def test_without_the_option_a_bad_gradient_goes_into_the_parameters() -> None:
    params = parameters()
    opt = optimizer(params, skip_nonfinite=False)
    opt.step(Spoiler(opt, params, torch.nan, {1}))
    assert params[3][1, 2].isnan()
    assert params[3].isnan().sum() == 1
    assert opt.skipped == 0


def test_a_flag_does_not_outlive_its_step() -> None:
    """It does not outlive a step that was abandoned either."""
    params = parameters()
    opt = optimizer(params)
    closure = Spoiler(opt, params, torch.nan, {0})
    closure()
    opt.ascend()
    opt.restore()
    before = snapshot(params)
    opt.step(closure)
    assert opt.skipped == 0
    assert distance(params, before) > 1e-3


def test_a_step_of_one_gradient_forgets_the_flag_of_an_abandoned_step() -> None:
    """The same where the next step takes no ascent that would begin it."""
    params = parameters()
    opt = optimizer(params)
    closure = Spoiler(opt, params, torch.nan, {0})
    closure()
    opt.ascend()
    opt.restore()
    for group in opt.param_groups:
        group["rho"] = 0.0
    before = snapshot(params)
    opt.step(closure)
    assert opt.skipped == 0
    assert distance(params, before) > 1e-3


def test_a_bad_gradient_where_there_is_no_ascent_counts_at_the_descent() -> None:
    params = parameters()
    opt = optimizer(params)
    opt.param_groups[1]["rho"] = 0.0  # its parameter is the one that is bad
    before = snapshot(params)
    opt.step(Spoiler(opt, params, torch.nan, {1}))
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))


def test_priming_without_gradients() -> None:
    """A step of length zero needs none, with the option as without."""
    params = parameters()
    opt = optimizer(params, lr=0.0)
    opt.param_groups[1]["lr"] = 0.0
    before = snapshot(params)
    opt.step()
    assert opt.skipped == 0
    assert all(map(same_bits, params, before))


def test_gradients_of_another_dtype_are_looked_at() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    p.grad_dtype = torch.bfloat16
    opt = ef.USAM([p], lr=0.1, rho=RHO, skip_nonfinite=True)
    for is_bad in (True, False):
        for phase in ("ascent", "descent"):
            p.grad = torch.ones(5, dtype=torch.bfloat16)
            if is_bad and phase == "descent":
                p.grad[2] = torch.nan
            opt.ascend() if phase == "ascent" else opt.step()
        assert opt.skipped == 1
        assert torch.equal(p.detach(), torch.ones(5)) == is_bad
