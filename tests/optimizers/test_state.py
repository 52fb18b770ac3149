"""State that users save, load, replace, clear, copy and convert between steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import SETTINGS, closure_of, distance, parameters, snapshot

HEAVY = SETTINGS["heavy ball"]


def train(steps: int = 3, **options: Any) -> tuple[ef.USAM, list, Callable[[], Tensor]]:
    params = parameters()
    opt = ef.USAM(params, **HEAVY | {"rho": RHO} | options)
    closure = closure_of(opt, params)
    for _ in range(steps):
        opt.step(closure)
    return opt, params, closure


def test_loading_goes_back() -> None:
    opt, params, closure = train()
    state_dict, before = copy.deepcopy(opt.state_dict()), snapshot(params)
    opt.step(closure)
    after = snapshot(params)
    with torch.no_grad():
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    opt.load_state_dict(state_dict)
    opt.step(closure)
    assert all(map(same_bits, params, after))


def test_groups_that_do_not_match_are_refused() -> None:
    opt, params, _ = train()
    two = ef.USAM([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        two.load_state_dict(opt.state_dict())


def test_the_state_holds_nothing_but_momentum() -> None:
    opt, params, _ = train()
    assert all(set(opt.state[p]) == {"momentum_buffer"} for p in params)
    without, _, _ = train(momentum=0.0, dampening=0.0)
    assert without.state_dict()["state"] == {}


def test_cleared_state_starts_again() -> None:
    opt, params, closure = train()
    opt.state.clear()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = ef.USAM(twins, **HEAVY, rho=RHO)
    evaluate = closure_of(other, twins)
    for _ in range(3):
        opt.step(closure)
        other.step(evaluate)
    assert all(map(same_bits, params, twins))


@pytest.mark.parametrize("how", ["deleted", "emptied", "none"])
def test_one_cleared_entry_starts_again_alone(how: str) -> None:
    """Its first step is undamped; the others' momentum goes on."""
    opt, params, _ = train()
    cleared, retained = params[3], params[4]
    momentum = opt.state[retained]["momentum_buffer"].clone()
    if how == "deleted":
        del opt.state[cleared]
    elif how == "emptied":
        opt.state[cleared].clear()
    else:
        opt.state[cleared]["momentum_buffer"] = None
    opt.param_groups[0]["rho"] = 0.0
    before = {p: 1 + HEAVY["weight_decay"] * p.detach() for p in (cleared, retained)}
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(opt.state[cleared]["momentum_buffer"], before[cleared])
    expected = 0.8 * momentum + 0.8 * before[retained]
    torch.testing.assert_close(opt.state[retained]["momentum_buffer"], expected)


@pytest.mark.parametrize("how", ["replaced", "in place", "new entry"])
def test_momentum_that_the_user_sets_is_used(how: str) -> None:
    opt, params, _ = train()
    p = params[3]
    inputs = torch.full_like(p, 2.0)
    if how == "replaced":
        opt.state[p]["momentum_buffer"] = inputs
    elif how == "in place":
        opt.state[p]["momentum_buffer"].copy_(inputs)
    else:
        opt.state[p] = {"momentum_buffer": inputs}
    opt.param_groups[0]["rho"] = 0.0
    before = p.detach().clone()
    for q in params:
        q.grad = torch.zeros_like(q)
    opt.step()
    expected = 0.8 * 2.0 + 0.8 * HEAVY["weight_decay"] * before
    torch.testing.assert_close(p.detach(), before - HEAVY["lr"] * expected)


def test_momentum_loaded_in_another_layout_takes_that_of_the_parameters() -> None:
    opt, params, closure = train()
    p = params[4]
    p_momentum = opt.state[p]["momentum_buffer"]
    expected, _, evaluate = train()
    expected.step(evaluate)
    opt.state[p]["momentum_buffer"] = p_momentum.contiguous()
    assert opt.state[p]["momentum_buffer"].stride() != p.stride()
    opt.step(closure)
    assert same_bits(p, expected.param_groups[0]["params"][4])


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on_alike_and_apart(how: str) -> None:
    opt, params, closure = train(skip_nonfinite=True, backend="reference")
    twin, twins = COPIES[how]((opt, params))
    assert twin.param_groups[0]["params"][0] is twins[0]
    assert (twin.skip_nonfinite, twin.backend) == (True, "reference")
    assert (twin.phase, twin.perturbed, twin.skipped) == ("ascent", False, 0)
    before = snapshot(twins)
    opt.step(closure)
    assert all(map(same_bits, twins, before))
    evaluate = closure_of(twin, twins)
    twin.step(evaluate)
    assert all(map(same_bits, params, twins))
    opt.step(closure)
    twin.step(evaluate)
    assert all(map(same_bits, params, twins))


def test_a_new_group_joins_between_steps() -> None:
    opt, params, _ = train()
    more = [nn.Parameter(torch.ones(3, dtype=torch.float64))]
    opt.add_param_group({"params": more, "lr": 0.5, "rho": 0.0})
    before = snapshot(params)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum((p * p).sum() for p in [*params, *more])
        loss.backward()
        return loss

    opt.step(closure)
    torch.testing.assert_close(more[0].detach(), torch.full_like(more[0], 1 - 0.5 * 2.03))
    assert distance(params, before) > 1e-3


def test_a_group_whose_list_is_replaced_or_edited() -> None:
    opt, params, closure = train()
    before = snapshot(params)
    opt.param_groups[0]["params"] = [p for p in params if p is not params[3]]
    opt.step(closure)
    assert same_bits(params[3], before[3])
    opt.param_groups[0]["params"].append(params[3])
    opt.step(closure)
    assert not same_bits(params[3], before[3])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean(dim=(2, 3))).square().mean()


CONVERSIONS: dict[str, Callable[[Net], object]] = {
    "double": lambda net: net.to(torch.float64),
    "bfloat16": lambda net: net.to(torch.bfloat16),
    "half of it": lambda net: net.linear.to(torch.float64),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("make", [torch.optim.SGD, ef.SGD, ef.USAM])
@pytest.mark.parametrize("how", CONVERSIONS)
def test_a_model_converted_between_steps(how: str, make: type) -> None:
    """Parameters keep their identity and change their memory; training goes on, as with torch."""
    torch.manual_seed(0)
    net = Net()
    opt = make(net.parameters(), lr=0.1, momentum=0.9)
    data = torch.randn(5, 2, 6, 6)

    def closure() -> Tensor:
        opt.zero_grad()
        middle = net.conv(data.to(net.conv.weight.dtype)).relu().mean(dim=(2, 3))
        loss = net.linear(middle.to(net.linear.weight.dtype)).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    first = closure().item()
    CONVERSIONS[how](net)
    kinds = [(p.dtype, p.stride()) for p in net.parameters()]
    for _ in range(5):
        opt.step(closure)
    assert [(p.dtype, p.stride()) for p in net.parameters()] == kinds
    assert all(p.isfinite().all() for p in net.parameters())
    assert closure().item() < 0.9 * first


@pytest.mark.parametrize(
    "make",
    [
        lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=0.5, ascent="anchored"),
        lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=0.5),
        lambda p: ef.HessianUSAM(p, lr=0.1, rho=0.1),
    ],
    ids=["anchored", "sequential", "hessian"],
)
def test_a_model_converted_within_a_step_is_refused_and_restored(make) -> None:
    """Its gradient at the perturbed point must not be taken for one at x."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 2, bias=False)
    opt, data = make(conv.parameters()), torch.randn(3, 2, 5, 5)
    before, calls = conv.weight.detach().clone(), []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = conv(data).square().sum()
        loss.backward()
        calls.append(loss)
        if len(calls) == 2:
            conv.to(memory_format=torch.channels_last)
        return loss

    with pytest.raises(Exception, match="strides"):
        opt.step(closure)
    assert len(calls) <= 3  # the sequential form reads its backups in the descent alone
    assert torch.equal(conv.weight, before)
    assert not opt.perturbed


def test_a_group_that_is_replaced_takes_effect_whole() -> None:
    x = nn.Parameter(torch.ones(3))
    opt = ef.USAM([x], lr=0.1, rho=0.1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = x.square().sum() / 2
        loss.backward()
        return loss

    opt.step(closure)
    opt.param_groups[0] = dict(opt.param_groups[0], lr=1.0, rho=0.0)
    opt.step(closure)
    assert torch.equal(x, torch.zeros(3))


def test_gradients_of_one_model_after_its_conversion_are_exact() -> None:
    """Momentum goes on in the new dtype."""
    params = parameters(torch.float32)
    opt = ef.USAM(params, **HEAVY, rho=RHO)
    opt.step(closure_of(opt, params))
    retained = [opt.state[p]["momentum_buffer"].double() for p in params]
    for p in params:
        p.data = p.data.double()
        p.grad = None
    opt.param_groups[0]["rho"] = 0.0
    before = snapshot(params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    for p, x, m in zip(params, before, retained, strict=True):
        d = 1 + HEAVY["weight_decay"] * x
        torch.testing.assert_close(p.detach(), x - HEAVY["lr"] * (0.8 * m + 0.8 * d))
        assert opt.state[p]["momentum_buffer"].dtype == torch.float64
