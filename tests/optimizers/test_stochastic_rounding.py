"""stochastic_rounding: small updates count on average; seeds are saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import same_bits
from optimizers.problems import METHODS, closure_of, parameters, snapshot

HALVES = (torch.bfloat16, torch.float16)
MAKE: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, **kw: ef.SGD(params, lr=0.05, momentum=0.9, **kw),
    **{
        name: lambda params, method=method, **kw: method.make(params, lr=0.05, **kw)
        for name, method in METHODS.items()
    },
    "adamw": lambda params, **kw: ef.AdamW(params, lr=0.05, **kw),
}


def constant_gradient(
    make: Callable[..., Any], dtype: torch.dtype, steps: int, **options: Any
) -> Tensor:
    """4,096 parameters at 1 after steps with the gradient 1."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    opt = make([p], **options)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        opt.step()
    return p.detach().double()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "make",
    [
        lambda p, **kw: ef.SGD(p, lr=2e-5, **kw),
        lambda p, **kw: ef.AdamW(p, lr=2e-5, weight_decay=0.0, **kw),
    ],
    ids=["SGD", "AdamW"],
)
def test_updates_below_half_an_ulp_count_on_average(
    make: Callable[..., Any], dtype: torch.dtype
) -> None:
    """2e-5 is a two-hundredth of what separates 1 from the bfloat16 below it.

    The mean over the parameters is right to five standard errors: that a parameter moves by an ulp
    has the probability lr / ulp in a step, and hence the step a variance of at most lr ulp.
    """
    steps = 200
    assert (constant_gradient(make, dtype, steps) == 1).all()
    result = constant_gradient(make, dtype, steps, stochastic_rounding=True)
    exact = 1 - 2e-5 * steps
    ulp = torch.finfo(dtype).eps / 2
    error = (steps * 2e-5 * ulp / result.numel()) ** 0.5
    assert abs(result.mean().item() - exact) < 5 * error < 0.2 * (1 - exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MAKE)
def test_it_changes_nothing_in_full_precision(name: str, dtype: torch.dtype) -> None:
    runs = []
    for stochastic in (False, True):
        params = parameters(dtype)
        opt = MAKE[name](params, stochastic_rounding=stochastic)
        closure = closure_of(opt, params)
        for _ in range(3):
            opt.step(closure)
        runs.append(snapshot(params))
        assert "rounding_seed" not in opt.param_groups[0]
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("name", MAKE)
def test_every_optimizer_draws_new_numbers_in_every_step(name: str) -> None:
    params = parameters(torch.bfloat16)
    opt = MAKE[name](params, stochastic_rounding=True)
    closure = closure_of(opt, params)
    for steps in (1, 2, 3):
        opt.step(closure)
        assert opt.param_groups[0]["rounding_seed"] == steps


def test_groups_are_rounded_independently() -> None:
    """Of 64 groups the means scatter as those of independent numbers, and not all alike."""
    params = [torch.nn.Parameter(torch.ones(1024, dtype=torch.bfloat16)) for _ in range(64)]
    opt = ef.SGD([{"params": [p]} for p in params], lr=1e-3, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    means = torch.stack([p.detach().double().mean() for p in params])
    share = 1e-3 / 2**-8  # of the elements that go down, by 2^-8
    expected = 2**-8 * (share * (1 - share) / 1024) ** 0.5
    assert 0.7 < means.std().item() / expected < 1.3


def test_a_run_that_is_saved_and_loaded_goes_on_to_the_bit() -> None:
    params = parameters(torch.bfloat16)
    opt = MAKE["usam"](params, stochastic_rounding=True)
    for _ in range(3):
        opt.step(closure_of(opt, params))
    state_dict = copy.deepcopy(opt.state_dict())
    others = parameters(torch.bfloat16)
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    other = MAKE["usam"](others, stochastic_rounding=True)
    other.load_state_dict(state_dict)
    for _ in range(3):
        opt.step(closure_of(opt, params))
        other.step(closure_of(other, others))
    assert all(map(same_bits, params, others))


def test_two_runs_are_the_same_run() -> None:
    """Nothing is drawn from torch's generators."""
    state = torch.get_rng_state()
    runs = []
    for _ in range(2):
        params = parameters(torch.float16)
        opt = MAKE["adamw"](params, stochastic_rounding=True)
        for _ in range(3):
            opt.step(closure_of(opt, params))
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_choose_for_themselves() -> None:
    a, b = (torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2))
    opt = ef.SGD([{"params": [a], "stochastic_rounding": True}, {"params": [b]}], lr=1e-4)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    opt.step()
    assert (a != 1).any()
    assert (b == 1).all()


def test_seeds_begin_again_after_the_last() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = ef.SGD([p], lr=0.1, stochastic_rounding=True)
    opt.param_groups[0]["rounding_seed"] = torch.tensor(2.0**24 - 1)
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.param_groups[0]["rounding_seed"] == 0
