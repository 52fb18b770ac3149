"""release_gradients: the same steps, bit for bit, and never all gradients at once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from eigenfilter.optimizers import in_backward
from optimizers.problems import (
    METHODS,
    SETTINGS,
    closure_of,
    loss_of,
    parameters,
    snapshot,
    state_of,
)

HEAVY = SETTINGS["heavy ball"]

MAKE: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, **kw: ef.SGD(params, **HEAVY, **kw),
    **{
        name: lambda params, method=method, **kw: method.make(params, **HEAVY, **kw)
        for name, method in METHODS.items()
    },
    "adamw": lambda params, **kw: ef.AdamW(params, lr=0.05, **kw),
    "adamw usam": lambda params, **kw: ef.AdamW(params, lr=0.05, method="usam", rho=0.5, **kw),
    "adamw sam": lambda params, **kw: ef.AdamW(params, lr=0.05, method="sam", rho=0.5, **kw),
}


def releasing(params: list[Tensor], **kw: Any) -> ef.USAM:
    return ef.USAM(params, **HEAVY, rho=RHO, release_gradients=True, **kw)


@pytest.mark.parametrize("name", [name for name in MAKE if name != "sgd"])
def test_rho_may_change_from_step_to_step(name: str) -> None:
    """A later step that takes no ascent does not use an earlier step's backups."""
    runs = []
    for release in (False, True):
        params = parameters()
        opt = MAKE[name](params, release_gradients=release)
        closure = closure_of(opt, params)
        rho = opt.param_groups[0]["rho"]
        for factor in (1, 0, 0, 1, 0):
            opt.param_groups[0]["rho"] = factor * rho
            opt.step(closure)
        runs.append([*params, *state_of(opt, params)])
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("name", MAKE)
def test_the_steps_are_those_of_whole_gradients(dtype: torch.dtype, name: str) -> None:
    runs = []
    for release in (False, True):
        params = parameters(dtype)
        groups = [{"params": params[:2], "lr": 0.02}, {"params": params[2:]}]
        opt = MAKE[name](groups, release_gradients=release)
        closure = closure_of(opt, params)
        losses = [opt.step(closure) for _ in range(6)]
        runs.append([*losses, *params, *state_of(opt, params)])
        assert all((p.grad is None) == release for p in params)
    whole, each = runs
    assert len(whole) == len(each)
    assert all(map(same_bits, whole, each))


def test_the_explicit_form_is_the_same() -> None:
    runs = []
    for explicit in (False, True):
        params = parameters()
        opt = releasing(params)
        closure = closure_of(opt, params)
        for _ in range(4):
            if explicit:
                with opt.evaluation():
                    closure()
                while opt.ascend():
                    with opt.evaluation():
                        closure()
                opt.step()
            else:
                opt.step(closure)
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("batch_bytes", [0, 100, None])
@pytest.mark.parametrize("name", ["sgd", "usam", "sequential", "anchored", "sam"])
def test_how_many_gradients_there_are_at_once(
    name: str, batch_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many that one completes the batch, and the one that waits: of 5 elements each."""
    if batch_bytes is not None:
        monkeypatch.setattr(in_backward, "BATCH_BYTES", batch_bytes)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 1, bias=False) for _ in range(1)), nn.Tanh())
    for _ in range(8):
        model.extend([nn.Linear(1, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False)])
    params = list(model.parameters())
    opt = MAKE[name](params, release_gradients=batch_bytes is not None)
    most: dict[tuple[str, int], int] = {}

    def count(_: Tensor) -> None:
        key = opt.phase, opt._step_state.ascents_taken
        most[key] = max(most.get(key, 0), sum(p.grad is not None for p in params))

    for p in params:
        p.register_post_accumulate_grad_hook(count)  # before the optimizer's own

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(torch.ones(2, 5)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    expected = {0: 2, 100: 6, None: len(params)}[batch_bytes]
    for (phase, _), count_of_phase in most.items():
        is_whole = name == "sam" and phase == "ascent"  # its norm needs all of them
        assert count_of_phase == (len(params) if is_whole else expected)
    assert len(most) == {"sgd": 1, "usam": 2, "sam": 2}.get(name, 3)


def test_a_tied_weight_is_updated_once_with_the_whole_gradient() -> None:
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        shared = nn.Linear(4, 4)
        model = nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), shared)
        opt = ef.USAM(model.parameters(), lr=0.1, rho=0.1, release_gradients=release)

        def closure(model: nn.Module = model, opt: ef.USAM = opt) -> Tensor:
            opt.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        runs.append(snapshot(list(model.parameters())))
    assert all(map(same_bits, *runs))


def test_a_parameter_without_a_gradient_is_restored() -> None:
    params = parameters()
    opt = releasing(params)
    before = snapshot(params)
    inputs = list(params)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of([p if p is q else p.detach() for p, q in zip(params, inputs, strict=True)])
        loss.backward()
        return loss

    with opt.evaluation():
        closure()
    assert opt.ascend()
    inputs[3] = params[0]
    with opt.evaluation():
        closure()
    assert not same_bits(params[3], before[3])
    opt.step()
    assert not opt.perturbed
    assert same_bits(params[3], before[3])
    assert not same_bits(params[5], before[5])


def test_groups_and_frozen_parameters_may_come_later() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    opt = releasing(params[:4])
    closure = closure_of(opt, params)
    opt.step(closure)
    opt.add_param_group({"params": params[4:], "lr": 0.01})
    params[0].requires_grad_(True)
    before = snapshot(params)
    for p in params:
        p.grad = None
    opt.step(closure)
    updated = [not same_bits(p, x) for p, x in zip(params, before, strict=True) if p.numel()]
    assert all(updated)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_releases_its_own(how: str) -> None:
    params = parameters()
    opt = releasing(params)
    opt.step(closure_of(opt, params))
    if how == "deepcopy":
        other, others = copy.deepcopy((opt, params))
    else:
        file = io.BytesIO()
        torch.save((opt, params), file)
        file.seek(0)
        other, others = torch.load(file, weights_only=False)
    before = snapshot(params)
    other.step(closure_of(other, others))
    assert all(map(same_bits, params, before))
    opt.step(closure_of(opt, params))
    assert all(map(same_bits, params, others))


def test_after_a_change_of_dtype_it_goes_on() -> None:
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        opt = ef.SGD(model.parameters(), **HEAVY, release_gradients=release)

        def closure(model: nn.Module = model, opt: ef.SGD = opt) -> Tensor:
            opt.zero_grad()
            x = torch.ones(2, 3, dtype=model.weight.dtype)
            loss = model(x).square().sum()
            loss.backward()
            return loss

        opt.step(closure)
        model.double()
        opt.step(closure)
        opt.step(closure)
        params = list(model.parameters())
        runs.append([*params, *state_of(opt, params)])
    assert all(map(same_bits, *runs))


def test_lr_0_steps_nowhere_and_ends_the_step() -> None:
    params = parameters()
    opt = releasing(params)
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = snapshot(params)
    for _ in range(2):
        opt.step(closure_of(opt, params))
    assert all(map(same_bits, params, before))
    sgd = ef.SGD(params, lr=0.0, release_gradients=True)
    for _ in range(2):
        sgd.step(closure_of(sgd, params))
    assert all(map(same_bits, params, before))


# What needs all gradients first.


def test_skip_nonfinite_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one"):
        releasing(parameters(), skip_nonfinite=True)


def test_clipping_is_refused() -> None:
    params = parameters()
    opt = ef.SGD(params, lr=0.1, release_gradients=True)
    with pytest.raises(RuntimeError, match="leave it False to clip"):
        opt.clip_grad_norm_(1.0)


def test_a_scaler_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    params = parameters(torch.float32)
    before = snapshot(params)
    opt = releasing(params)
    scaler.scale(loss_of(params)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        opt.ascend(grad_scaler=scaler)
    assert all(map(same_bits, params, before))
    opt = ef.SGD(params, lr=0.1, release_gradients=True)
    with pytest.raises(RuntimeError, match="release_gradients"):
        scaler.step(opt)
    assert all(map(same_bits, params, before))


@pytest.mark.parametrize("explicit", [False, True])
def test_a_loss_scale_of_earlier_steps_does_not_reach_released_gradients(explicit: bool) -> None:
    runs = []
    for scale in (1.0, 64.0):
        params = [nn.Parameter(torch.ones(3))]
        opt = ef.SGD(params, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(params[0].square().sum()).backward()
        scaler.step(opt)
        opt.zero_grad()
        opt.release_gradients = True

        def closure(opt: ef.SGD = opt, params: list[nn.Parameter] = params) -> Tensor:
            loss = params[0].square().sum()
            loss.backward()
            return loss

        if explicit:
            with opt.evaluation():
                closure()
            opt.step()
        else:
            opt.step(closure)
        runs.append(params)
    assert all(map(same_bits, *runs))
