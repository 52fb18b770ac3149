"""AdamW's counts of steps: one for each parameter, and an edit of one changes no other."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO
from optimizers.problems import closure_of, distance, loss_of, parameters

DECAY: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.03}


def train(opt: Any, params: list[nn.Parameter], steps: int, missing: tuple[int, ...] = ()) -> None:
    for _ in range(steps):
        closure_of(opt, params)()
        for i in missing:
            params[i].grad = None
        opt.step()


def steps_of(opt: Any, params: list[nn.Parameter]) -> list[float]:
    return [float(opt.state[p]["step"]) for p in params]


def zero(t: Tensor) -> None:
    t.zero_()


def through_data(t: Tensor) -> None:
    t.data.fill_(0.0)


def through_numpy(t: Tensor) -> None:
    t.numpy()[...] = 0.0


EDITS: dict[str, Callable[[Tensor], None]] = {
    "zero_": zero,
    "data": through_data,
    "numpy": through_numpy,
}


def reset(opt: Any, p: nn.Parameter, edit: Callable[[Tensor], None]) -> None:
    """Start one parameter again, in place, as some training loops do."""
    for value in opt.state[p].values():
        edit(value)


def itself(opt: ef.AdamW, params: list[nn.Parameter]) -> tuple[ef.AdamW, list[nn.Parameter]]:
    return opt, params


def loaded(opt: ef.AdamW, params: list[nn.Parameter]) -> tuple[ef.AdamW, list[nn.Parameter]]:
    opt.load_state_dict(opt.state_dict())
    return opt, params


def loaded_elsewhere(
    opt: ef.AdamW, params: list[nn.Parameter]
) -> tuple[ef.AdamW, list[nn.Parameter]]:
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    other = ef.AdamW(params, **DECAY)
    other.load_state_dict(torch.load(buffer))
    return other, params


def deep_copied(opt: ef.AdamW, params: list[nn.Parameter]) -> tuple[ef.AdamW, list[nn.Parameter]]:
    new, news = copy.deepcopy((opt, params))
    return new, news


def pickled(opt: ef.AdamW, params: list[nn.Parameter]) -> tuple[ef.AdamW, list[nn.Parameter]]:
    new, news = pickle.loads(pickle.dumps((opt, params)))
    return new, news


AFTER = [itself, loaded, loaded_elsewhere, deep_copied, pickled]


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("then", AFTER)
@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_parameter_that_starts_again_does_so_alone(
    index: int, then: Callable[..., Any], edit: Callable[[Tensor], None]
) -> None:
    """Against torch's, whose parameters share nothing."""
    params, plain = parameters(), parameters()
    opt, reference = ef.AdamW(params, **DECAY), torch.optim.AdamW(plain, **DECAY)
    for each, own in ((opt, params), (reference, plain)):
        train(each, own, 3)
    opt, params = then(opt, params)
    reset(opt, params[index], edit)
    reset(reference, plain[index], zero)
    expected = [3.0] * 6
    expected[index] = 0.0
    assert steps_of(opt, params) == expected
    for each, own in ((opt, params), (reference, plain)):
        train(each, own, 4)
    assert steps_of(opt, params) == steps_of(reference, plain)
    assert distance(params, plain) < 1e-13


@pytest.mark.parametrize("value", [7.0, 0.0, 2.0])
def test_counts_that_become_equal_step_together(value: float) -> None:
    params, plain = parameters(), parameters()
    opt, reference = ef.AdamW(params, **DECAY), torch.optim.AdamW(plain, **DECAY)
    for each, own in ((opt, params), (reference, plain)):
        train(each, own, 2)
        train(each, own, 1, missing=(1, 4))
        for i in (0, 4):
            each.state[own[i]]["step"].fill_(value)
        train(each, own, 2, missing=(2,))
        train(each, own, 2)
    assert steps_of(opt, params) == steps_of(reference, plain)
    assert distance(params, plain) < 1e-13


def test_an_edit_of_a_saved_state_changes_nothing_here() -> None:
    params = parameters()
    opt = ef.AdamW(params, **DECAY)
    train(opt, params, 2)
    saved = opt.state_dict()
    saved["state"][0]["step"].zero_()
    assert steps_of(opt, params) == [2.0] * 6


def test_distributed_checkpointing_loads_in_place() -> None:
    """DCP fills the tensors of one state dict and gives it back."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    models = [nn.Linear(3, 2).double() for _ in range(2)]
    opts = [ef.AdamW(m.parameters(), **DECAY) for m in models]
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def step(i: int) -> None:
        opts[i].zero_grad()
        models[i](x).square().sum().backward()
        opts[i].step()

    for _ in range(3):
        step(0)
    saved = get_optimizer_state_dict(models[0], opts[0])
    target = get_optimizer_state_dict(models[1], opts[1])
    models[1].load_state_dict(models[0].state_dict())
    for name, entry in saved["state"].items():
        for key, value in entry.items():
            target["state"][name][key].copy_(value)
    target["state"]["bias"]["step"].zero_()
    set_optimizer_state_dict(models[1], opts[1], target)
    assert steps_of(opts[1], list(models[1].parameters())) == [3.0, 0.0]
    step(1)
    assert steps_of(opts[1], list(models[1].parameters())) == [4.0, 1.0]


def test_gradients_that_come_and_go_at_random() -> None:
    params, plain = parameters(), parameters()
    opt, reference = ef.AdamW(params, **DECAY), torch.optim.AdamW(plain, **DECAY)
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        missing = tuple(i for i in range(6) if torch.rand((), generator=generator) < 0.4)
        train(opt, params, 1, missing)
        train(reference, plain, 1, missing)
    visited = [i for i, p in enumerate(plain) if reference.state[p]]
    assert steps_of(opt, [params[i] for i in visited]) == steps_of(
        reference, [plain[i] for i in visited]
    )
    assert distance(params, plain) < 1e-12


def test_skipped_steps_are_not_counted_whoever_skips_them() -> None:
    params = parameters()
    opt = ef.AdamW(params, **DECAY, skip_nonfinite=True)
    train(opt, params, 2)
    closure_of(opt, params)()
    params[4].grad = torch.full_like(params[4], float("nan"))
    params[1].grad = None
    opt.step()
    assert steps_of(opt, params) == [2.0] * 6
    train(opt, params, 1, missing=(1,))
    assert steps_of(opt, params) == [3.0, 2.0, 3.0, 3.0, 3.0, 3.0]


def test_an_edit_in_the_middle_of_a_step_is_refused() -> None:
    params = parameters()
    opt = ef.AdamW(params, **DECAY, rho=RHO)
    opt.step(closure_of(opt, params))
    closure_of(opt, params)()
    opt.ascend()
    opt.state[params[2]]["step"].zero_()
    loss_of(params).backward()
    with pytest.raises(RuntimeError, match="changed between an ascent and its step"):
        opt.step()


def test_a_count_that_is_held_stays_the_count() -> None:
    params, plain = parameters(), parameters()
    opt, reference = ef.AdamW(params, **DECAY), torch.optim.AdamW(plain, **DECAY)
    for each, own in ((opt, params), (reference, plain)):
        train(each, own, 2)
        tensors = each.state[own[1]]["step"]
        for _ in range(3):
            tensors.zero_()
            train(each, own, 1)
    assert steps_of(opt, params) == steps_of(reference, plain)
    assert distance(params, plain) < 1e-13


def test_one_tensor_shared_by_two_parameters_is_split() -> None:
    params = parameters()
    opt = ef.AdamW(params, **DECAY)
    train(opt, params, 2)
    opt.state[params[1]]["step"] = opt.state[params[0]]["step"]
    train(opt, params, 1)
    opt.state[params[0]]["step"].zero_()
    train(opt, params, 1)
    assert steps_of(opt, params) == [1.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_released_gradients_keep_counts_together() -> None:
    params, plain = parameters(), parameters()
    opt = ef.AdamW(params, **DECAY, release_gradients=True)
    other = ef.AdamW(plain, **DECAY)
    for each, own in ((opt, params), (other, plain)):
        for _ in range(3):
            each.step(closure_of(each, own))
    assert len(opt._update._counts._blocks) == 1
    assert steps_of(opt, params) == [3.0] * 6
    assert distance(params, plain) == 0.0
