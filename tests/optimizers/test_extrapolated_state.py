"""Checkpoints of optimizers whose parameters hold a point ahead of x, and layouts that change."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import eigenfilter as ef
from cases import same_bits
from optimizers.extrapolated import distance, parameters, set_gradients, train


@dataclass(frozen=True)
class Kind:
    """An optimizer, the option that says how far ahead its parameters are, and a value of it."""

    make: Callable[..., Any]
    option: str
    value: float

    def __call__(self, params: Any, value: float | None = None) -> Any:
        return self.make(params, **{self.option: self.value if value is None else value})


KINDS = {
    "SGD": Kind(functools.partial(ef.SGD, lr=0.02, momentum=0.9), "extrapolation", 0.08),
    "AdamW": Kind(functools.partial(ef.AdamW, lr=0.02, eps=0.03), "extrapolation", 0.05),
    "MSAM": Kind(functools.partial(ef.MSAM, lr=0.02, momentum=0.9), "rho", 0.3),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@each_kind
@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_goes_on_to_the_bit(kind: Kind, dtype: torch.dtype, evaluates: bool) -> None:
    if kind is KINDS["MSAM"] and dtype.itemsize == 2:
        dtype = torch.float64  # it takes no 16 bits
    params, others = parameters(dtype), parameters(dtype)
    opt, other = kind(params), kind(others)
    train(opt, params, 5)
    if evaluates:
        opt.eval()
    saved = copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(saved)
    for each, ps in ((opt, params), (other, others)):
        each.train()
        train(each, ps, 5)
    assert all(map(same_bits, params, others))


@each_kind
@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_distributed_checkpoints(kind: Kind, evaluates: bool, share: float) -> None:
    """What was saved with this share of the value is loaded into an optimizer with the whole."""
    first, second = (nn.Linear(3, 2).double() for _ in range(2))
    saved_with = share * kind.value
    opt = kind(first.parameters(), saved_with)
    train(opt, list(first.parameters()), 3)
    if evaluates:
        opt.eval()
    state, optimizer_state = copy.deepcopy(get_state_dict(first, opt))
    other = kind(second.parameters())
    set_state_dict(second, other, model_state_dict=state, optim_state_dict=optimizer_state)
    assert other.param_groups[0][kind.option] == saved_with
    for mode in ("train", "eval"):
        for each in (opt, other):
            getattr(each, mode)()
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)


@each_kind
def test_another_layout_in_between(kind: Kind) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    opt, other = kind(params), kind(others)
    train(opt, params, 2)
    train(other, others, 2)
    params[0].data = params[0].data.t().contiguous().t()
    for each, ps in ((opt, params), (other, others)):
        each.eval()
        each.train()
        train(each, ps, 2)
    assert not params[0].is_contiguous()
    assert distance(params, [p.detach().double() for p in others]) < 1e-6


@each_kind
def test_a_refused_step_changes_nothing(kind: Kind) -> None:
    params = parameters()
    opt = kind(params)
    train(opt, params, 2)
    opt.param_groups[0][kind.option] = 0.5 * kind.value
    before = [p.detach().clone() for p in params]
    set_gradients(params)
    params[0].grad = torch.rand(4, 5, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        opt.step()
    assert all(map(same_bits, before, params))
