"""The two sides of Hessian USAM's finite difference: the same random numbers, the same function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import SETTINGS, backward, closure_of, loss_of, parameters

HEAVY = SETTINGS["heavy ball"]


# The same random numbers.


def noisy(
    opt: ef.HessianUSAM, params: Sequence[Tensor], inputs: Sequence[Tensor] | None = None
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A closure with dropout, and the list of its masks, which may be passed in."""
    masks: list[Tensor] = []

    def closure() -> Tensor:
        opt.zero_grad()
        mask = draw_mask() if inputs is None else inputs[len(masks)]
        masks.append(mask)
        loss = loss_of(params) + 0.1 * (mask * params[-1] ** 2).sum()
        backward(opt, loss)
        return loss

    return closure, masks


def draw_mask() -> Tensor:
    return functional.dropout(torch.ones(1000, dtype=torch.float64), 0.5)


def explicit_step(opt: ef.HessianUSAM, closure: Callable[[], Tensor]) -> None:
    with opt.evaluation():
        closure()
    while opt.ascend():
        with opt.evaluation():
            closure()
    opt.step()


@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_both_sides_of_a_difference_draw_the_same(form: str) -> None:
    """The descent and the next step draw new numbers, as if only one evaluation had drawn."""
    params, fixed = parameters(), parameters()
    opt, other = (ef.HessianUSAM(p, **HEAVY, rho=RHO) for p in (params, fixed))
    closure, masks = noisy(opt, params)
    torch.manual_seed(3)
    for _ in range(3):
        opt.step(closure) if form == "closure" else explicit_step(opt, closure)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = [draw_mask() for _ in range(6)]
    assert torch.equal(torch.get_rng_state(), after)
    sides = [expected[i] for i in (0, 0, 1, 2, 2, 3, 4, 4, 5)]
    assert all(map(torch.equal, masks, sides))
    assert len({tuple(mask.tolist()) for mask in masks}) == 6
    evaluate, _ = noisy(other, fixed, masks)
    for _ in range(3):
        other.step(evaluate)
    assert all(map(same_bits, params, fixed))


@pytest.mark.parametrize("inside", [(), (0,), (1,)], ids=["none", "the first", "the second"])
def test_two_sides_that_draw_differently_warn(inside: tuple[int, ...]) -> None:
    """Unless both calls are inside the context; no step before this one is replayed."""
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO)
    closure, masks = noisy(opt, params)
    explicit_step(opt, closure)
    masks.clear()
    for call in range(2):
        if call in inside:
            with opt.evaluation():
                closure()
        else:
            closure()
        if call == 0:
            opt.ascend()
    assert not torch.equal(*masks)
    with pytest.warns(UserWarning, match=r"saw different random numbers .* `with opt.evaluation"):
        opt.ascend()
    closure()
    opt.step()


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (lambda p: ef.HessianUSAM(p, lr=0.1, rho=RHO, hvp="autograd"), 2),
        (lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=RHO), 3),
    ],
)
def test_without_a_difference_every_call_draws_new_numbers(make: Any, calls: int) -> None:
    """There is no warning either, with the context or without it."""
    params = parameters()
    opt = make(params)
    closure, masks = noisy(opt, params)
    opt.step(closure)
    explicit_step(opt, closure)
    closure()
    while opt.ascend():
        closure()
    opt.step()
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 3 * calls


def test_without_randomness_nothing_warns() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)
    for _ in range(2):
        closure()
        while opt.ascend():
            drawn_elsewhere = closure()
        opt.step()
    assert drawn_elsewhere.isfinite()


def test_random_numbers_drawn_outside_the_context_are_of_no_account() -> None:
    """A loader may draw numbers at any time."""
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO)
    closure, masks = noisy(opt, params)
    for draws in (1, 2):
        with opt.evaluation():
            closure()
        for _ in range(draws):
            draw_mask()
        opt.ascend()
    assert torch.equal(*masks)
    closure()
    opt.step()


@pytest.mark.parametrize("context", [True, False])
def test_an_abandoned_step_is_neither_replayed_nor_warned_about(context: bool) -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO)
    closure, masks = noisy(opt, params)
    with opt.evaluation() if context else nullcontext():
        closure()
    opt.ascend()
    opt.restore()
    opt.step(closure)
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])


def test_an_error_on_the_second_side_leaves_no_replay_behind() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO)
    closure, masks = noisy(opt, params)

    def failing() -> Tensor:
        if opt.perturbed:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        opt.step(failing)
    opt.step(closure)
    assert torch.equal(masks[1], masks[2])
    assert not torch.equal(masks[2], masks[3])


# The same function.


class Regression:
    """A tanh network on a batch of 16, which is another at each call where asked for."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
        self.opt = ef.HessianUSAM(self.model.parameters(), lr=0.05, rho=RHO, **settings)
        self.calls = 0

    def loss(self, *, seed: int) -> Tensor:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        return (self.model(x) - 3 * x.sin().sum(dim=1, keepdim=True)).square().mean()

    def closure(self, *, fresh: bool = False) -> Tensor:
        self.calls += 1
        self.opt.zero_grad()
        loss = self.loss(seed=self.calls if fresh else 0)
        torch.autograd.backward(loss)
        return loss

    def steps(self, count: int, *, fresh: bool = False) -> None:
        for _ in range(count):
            self.opt.step(lambda: self.closure(fresh=fresh))


IMPLAUSIBLE = "an implausible finite difference"


def test_two_functions_warn_once() -> None:
    task = Regression()
    with pytest.warns(UserWarning, match=IMPLAUSIBLE) as caught:
        task.steps(8, fresh=True)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_function_does_not_warn(dtype: torch.dtype) -> None:
    """From the start to the minimum, where the rise drowns in the curvature and in rounding."""
    task = Regression()
    task.model.to(dtype)
    task.loss = lambda *, seed: sum(p.square().sum() for p in task.model.parameters())
    for _ in range(30):
        task.opt = ef.HessianUSAM(task.model.parameters(), lr=0.2, rho=RHO)
        task.steps(10)
    assert task.loss(seed=0).item() < 1e-12


def test_autocast_does_not_warn() -> None:
    task = Regression(fd_step=0.01)
    plain = task.loss

    def cast(*, seed: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(seed=seed)

    task.loss = cast
    task.steps(10)
    assert task.calls == 30


@pytest.mark.parametrize("value", [None, "text", torch.ones(2), (torch.ones(()),)])
def test_losses_that_are_no_numbers_are_neither_compared_nor_stored(value: object) -> None:
    task = Regression()

    def closure() -> object:
        task.closure(fresh=True)
        assert not task.opt.perturbation._losses
        return value

    for _ in range(3):
        task.opt.step(closure)
    assert task.calls == 9


def test_later_steps_are_not_judged() -> None:
    """Reading a loss waits for its device."""
    task = Regression()
    task.steps(10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task.steps(5, fresh=True)
    assert not caught
