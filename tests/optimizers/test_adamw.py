"""AdamW is torch.optim.AdamW, with its gradient taken where an ascent leads.

That it steps, skips, saves and copies as every optimizer does is tested in `test_conformance.py`
and `test_conformance_state.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import (
    METHODS,
    Exact,
    closure_of,
    distance,
    loss_of,
    parameters,
    sign_of,
    snapshot,
)

# eps large enough that where it is added shows, and that runs settle: near the minimum a step is
# lr / eps times a gradient, and beyond the edge of that rounding errors grow.
ADAMW: dict[str, dict[str, Any]] = {
    "decay": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 0.02, "weight_decay": 0.07},
    "no decay": {"lr": 0.02, "betas": (0.9, 0.99), "eps": 0.05, "weight_decay": 0.0},
    "maximize": {
        "lr": 0.03,
        "betas": (0.7, 0.9),
        "eps": 0.03,
        "weight_decay": 0.07,
        "maximize": True,
    },
}
DECAY = ADAMW["decay"]
all_settings = pytest.mark.parametrize("settings", ADAMW.values(), ids=ADAMW)


def train(opt: Any, params: Sequence[Tensor], steps: int, sign: float = 1.0) -> None:
    closure = closure_of(opt, params, sign)
    for _ in range(steps):
        opt.step(closure)


def steps_of(opt: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[float]:
    return [float(opt.state[p]["step"]) for p in params]


@all_settings
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_hundreds_of_steps(dtype: torch.dtype, tolerance: float, settings: dict[str, Any]) -> None:
    """Measured: 1.6e-15 and 4.8e-7, a few ulps of the parameters."""
    ours, theirs = parameters(dtype), parameters(dtype)
    start = snapshot(ours)
    opt, reference = ef.AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(4):
        train(opt, ours, 40, sign_of(settings))
        train(reference, theirs, 40, sign_of(settings))
        assert distance(ours, theirs) <= tolerance
    for p, q in zip(ours, theirs, strict=True):
        assert opt.state[p].keys() == reference.state[q].keys()
        for name, value in reference.state[q].items():
            mine = opt.state[p][name]
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape)
            torch.testing.assert_close(mine, value, rtol=10 * tolerance, atol=tolerance)
    assert steps_of(opt, ours) == [160.0] * 6
    assert distance(ours, start) > 0.3


@all_settings
def test_few_steps_agree_to_rounding(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """In narrow dtypes too, where torch rounds more often. Measured: 2 ulps a step."""
    ours, theirs = parameters(dtype), parameters(dtype)
    opt, reference = ef.AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(1, 6):
        train(opt, ours, 1, sign_of(settings))
        train(reference, theirs, 1, sign_of(settings))
        assert distance(ours, theirs) <= 4 * step * torch.finfo(dtype).eps


@all_settings
def test_the_reference_backend_gives_the_same_bits(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    results = []
    for backend in (None, "reference"):
        params = parameters(dtype)
        opt = ef.AdamW(params, **settings, rho=RHO, backend=backend)
        train(opt, params, 20, sign_of(settings))
        state = [opt.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq", "step")]
        results.append([*params, *state])
    assert all(map(same_bits, *results))


@all_settings
@pytest.mark.parametrize("method", METHODS)
def test_with_a_method_the_gradient_is_taken_where_it_leads(
    method: str, settings: dict[str, Any]
) -> None:
    """torch's AdamW in float64, with the gradient at the point of the definition."""
    m = METHODS[method]
    params, theirs = parameters(), parameters()
    opt = ef.AdamW(params, **settings, method=m.name, rho=m.rho, **m.options)
    reference = torch.optim.AdamW(theirs, **settings)
    closure = closure_of(opt, params, sign_of(settings))
    exact = Exact(theirs, settings, m.rho, method)
    for _ in range(24):
        opt.step(closure)
        exact.x = snapshot(theirs)
        for q, y in zip(theirs, exact.gradient(exact.descent_point()), strict=True):
            q.grad = -y if settings.get("maximize") else y
        reference.step()
        assert distance(params, theirs) <= (1e-7 if method == "difference" else 1e-13)
    assert closure.calls == 24 * m.calls
    plain = parameters()
    train(torch.optim.AdamW(plain, **settings), plain, 24, sign_of(settings))
    assert distance(params, plain) > 1e-4


def test_arguments_are_torchs_in_order_and_default() -> None:
    ours = inspect.signature(ef.AdamW).parameters
    theirs = inspect.signature(torch.optim.AdamW).parameters
    for name in ("params", "lr", "betas", "eps", "weight_decay", "maximize"):
        assert ours[name].default == theirs[name].default
    assert list(ours)[:5] == list(theirs)[:5]
    assert ours["rho"].default == 0.0


# Counting steps.


def test_parameters_that_miss_gradients_count_their_own_steps() -> None:
    ours, theirs = parameters(), parameters()
    opt, reference = ef.AdamW(ours, **DECAY), torch.optim.AdamW(theirs, **DECAY)
    for i in range(12):
        for o, params in ((opt, ours), (reference, theirs)):
            closure_of(o, params)()
            if i % 2:
                params[1].grad = None
            if i % 3 == 0:  # the first step too
                params[3].grad = params[4].grad = None
            o.step()
    assert distance(ours, theirs) < 1e-14
    assert steps_of(opt, ours) == steps_of(reference, theirs) == [12, 6, 12, 8, 8, 12]


def test_a_saved_state_does_not_go_on_counting() -> None:
    """Neither with the optimizer that it is of, nor with one into which it was loaded."""
    params = parameters()
    opt = ef.AdamW(params, **DECAY)
    train(opt, params, 2)
    state_dict = opt.state_dict()
    train(opt, params, 3)
    opt.load_state_dict(state_dict)
    train(opt, params, 3)
    assert {float(entry["step"]) for entry in state_dict["state"].values()} == {2.0}


def test_a_state_whose_steps_are_numbers_or_of_another_shape() -> None:
    """As older versions of torch saved them."""
    params, theirs = parameters(), parameters()
    opt, other = ef.AdamW(params, **DECAY), ef.AdamW(theirs, **DECAY)
    train(opt, params, 2)
    train(other, theirs, 2)
    saved = opt.state_dict()
    for i, entry in saved["state"].items():
        entry["step"] = 2 if i % 2 else torch.tensor([2.0])
    opt.load_state_dict(saved)
    train(opt, params, 2)
    train(other, theirs, 2)
    assert all(map(same_bits, params, theirs))


# Skipping.


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_a_first_step_that_is_skipped_is_not_counted(dtype: torch.dtype, rho: float) -> None:
    params, plain = parameters(dtype), parameters(dtype)
    opt, other = (
        ef.AdamW(params, **DECAY, rho=rho, skip_nonfinite=True),
        ef.AdamW(plain, **DECAY, rho=rho),
    )
    start = snapshot(params)
    for _ in range(2):
        opt.step(spoiling_closure(closure_of(opt, params), params))
        assert all(map(same_bits, params, start))
        assert steps_of(opt, params) == [0.0] * 6
        assert not any(opt.state[p]["exp_avg"].any() for p in params)
        assert not any(opt.state[p]["exp_avg_sq"].any() for p in params)
    assert opt.skipped == 2
    train(opt, params, 3)
    train(other, plain, 3)
    assert steps_of(opt, params) == [3.0] * 6
    assert all(map(same_bits, params, plain))


def spoiling_closure(closure: Any, params: Sequence[Tensor]) -> Any:
    def spoiling() -> Tensor:
        loss = closure()
        params[3].grad[1, 2] = torch.nan
        return loss

    return spoiling


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_a_scaler_that_starts_too_high(rho: float) -> None:
    """Skipped steps lower the scale, count for nothing, and the rest is the unscaled run's."""
    plain, params = parameters(torch.float32), parameters(torch.float32)
    opt, reference = (ef.AdamW(p, **DECAY, rho=rho) for p in (params, plain))
    scaler = GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-3)

    def evaluate() -> None:
        opt.zero_grad()
        scaler.scale(loss_of(params)).backward()

    calls = 0
    while not opt.state or steps_of(opt, params) != [4.0] * 6:
        evaluate()
        while opt.ascend(grad_scaler=scaler):
            evaluate()
        scaler.step(opt)
        scaler.update()
        calls += 1
    assert opt.skipped == calls - 4 > 0
    assert scaler.get_scale() == 2.0 ** (127 - 3 * opt.skipped)
    train(reference, plain, 4)
    assert all(map(same_bits, params, plain))


# Hyperparameters.


def test_tensors_give_the_bits_of_numbers() -> None:
    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    beta1, beta2 = DECAY["betas"]
    for changes in (
        {"lr": tensor(DECAY["lr"])},
        {"betas": (tensor(beta1), tensor(beta2))},
        {"weight_decay": tensor(DECAY["weight_decay"])},
        {"rho": tensor(RHO)},
    ):
        params, expected = parameters(), parameters()
        train(ef.AdamW(params, **DECAY | {"rho": RHO} | changes), params, 4)
        train(ef.AdamW(expected, **DECAY, rho=RHO), expected, 4)
        assert all(map(same_bits, params, expected)), changes


def test_an_lr_that_is_changed_in_place() -> None:
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.1, dtype=torch.float64)
    opt = ef.AdamW(ours, **DECAY | {"lr": lr})
    reference = torch.optim.AdamW(theirs, **DECAY | {"lr": 0.1})
    for factor in (1.0, 0.5, 0.5):
        lr.mul_(factor)
        reference.param_groups[0]["lr"] *= factor
        train(opt, ours, 1)
        train(reference, theirs, 1)
    assert distance(ours, theirs) < 1e-14
