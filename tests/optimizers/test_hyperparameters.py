"""lr, rho and the rest live in param_groups: numbers or tensors, scheduled, and 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import SETTINGS, Exact, closure_of, distance, parameters, snapshot

HEAVY = SETTINGS["heavy ball"]


def run(steps: int = 4, **options: Any) -> tuple[list, ef.USAM, int]:
    params = parameters()
    opt = ef.USAM(params, **HEAVY | {"rho": RHO} | options)
    closure = closure_of(opt, params)
    for _ in range(steps):
        opt.step(closure)
    return params, opt, closure.calls


@pytest.mark.parametrize("name", ["lr", "rho", "weight_decay"])
def test_tensors_give_the_bits_of_numbers(name: str) -> None:
    value = (HEAVY | {"rho": RHO})[name]
    expected, _, _ = run()
    params, opt, _ = run(**{name: torch.tensor(value, dtype=torch.float64)})
    assert all(map(same_bits, params, expected))
    assert isinstance(opt.param_groups[0][name], Tensor)


@pytest.mark.parametrize("maximize", [False, True])
def test_rho_as_a_float32_tensor_of_one_element(maximize: bool) -> None:
    expected, _, _ = run(rho=torch.tensor(RHO).item(), maximize=maximize, steps=2)
    params, _, _ = run(rho=torch.tensor([RHO]), maximize=maximize, steps=2)
    assert all(map(same_bits, params, expected))


def test_a_tensor_can_be_changed_in_place() -> None:
    lr, rho = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    params = parameters()
    opt = ef.USAM(params, lr=lr, rho=rho)
    closure = closure_of(opt, params)
    exact = Exact(params, {"lr": 0.1}, 0.2)
    for factor in (1.0, 0.5, 0.5):
        lr.mul_(factor)
        rho.mul_(factor)
        exact.settings["lr"] *= factor
        exact.rho = [r * factor for r in exact.rho]
        opt.step(closure)
        exact.step()
    assert distance(params, exact.x) < 1e-15


def test_schedulers_of_lr() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.2, rho=RHO)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    closure = closure_of(opt, params)
    exact = Exact(params, {"lr": 0.2})
    for epoch in range(4):
        exact.settings["lr"] = 0.2 * 0.5**epoch
        opt.step(closure)
        exact.step()
        schedule.step()
    assert distance(params, exact.x) < 1e-15


def test_a_schedule_of_momentum_by_onecycle() -> None:
    params, twins = parameters(), parameters()
    results = []
    for make, p in ((ef.SGD, params), (torch.optim.SGD, twins)):
        opt = make(p, lr=0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
        closure = closure_of(opt, p)
        values = []
        for _ in range(8):
            opt.step(closure)
            schedule.step()
            values.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
        results.append(values)
    assert results[0] == results[1]
    assert len(set(results[0])) == 8
    assert distance(params, twins) < 1e-14


def test_momentum_switched_on_off_and_on_is_torchs() -> None:
    """Buffers that are there wait; where there are none, the first step is undamped."""
    params, twins = parameters(), parameters()
    for make, p in ((ef.SGD, params), (torch.optim.SGD, twins)):
        opt = make(p, lr=0.1)
        closure = closure_of(opt, p)
        for momentum, dampening in ((0.0, 0.3), (0.8, 0.3), (0.8, 0.1), (0.0, 0.1), (0.7, 0.2)):
            opt.param_groups[0].update(momentum=momentum, dampening=dampening)
            opt.step(closure)
    assert distance(params, twins) < 1e-14


def test_a_schedule_of_rho_by_hand_down_to_none() -> None:
    params = parameters()
    opt = ef.USAM(params, **HEAVY, rho=0.4)
    closure = closure_of(opt, params)
    exact = Exact(params, HEAVY, 0.4)
    for rho in (0.4, 0.2, 0.0, 0.1):
        opt.param_groups[0]["rho"] = rho
        exact.rho = [rho] * 6
        opt.step(closure)
        exact.step()
    assert distance(params, exact.x) < 1e-15
    assert closure.calls == 2 + 2 + 1 + 2


def test_a_tensor_never_counts_as_zero() -> None:
    params, _, calls = run(rho=torch.tensor(0.0))
    expected, _, _ = run(rho=0.0)
    assert calls == 8
    assert all(map(same_bits, params, expected))


def test_groups_without_an_ascent_beside_groups_with_one() -> None:
    params = parameters()
    groups = [{"params": params[:3], "rho": 0.0}, {"params": params[3:], "rho": 0.3}]
    opt = ef.USAM(groups, **HEAVY)
    closure = closure_of(opt, params)
    exact = Exact(params, HEAVY, [0.0] * 3 + [0.3] * 3)
    for _ in range(3):
        closure()
        params[1].grad[0] = torch.inf  # of no ascent, and of no consequence
        before, versions = snapshot(params), [p._version for p in params]
        assert opt.ascend()
        assert all(map(same_bits, params[:3], before[:3]))
        assert [p._version for p in params[:3]] == versions[:3]
        assert not any(same_bits(p, b) for p, b in zip(params[3:], before[3:], strict=True))
        assert all(p.grad is None for p in params)
        closure()
        opt.step()
        exact.step()
    assert distance(params, exact.x) < 1e-15


@pytest.mark.parametrize(("make", "more"), [(ef.USAM, {"momentum": 0.8}), (ef.AdamW, {})])
def test_every_lr_zero_primes_the_state(make: type, more: dict[str, Any]) -> None:
    """As distributed checkpointing makes the state exist: of zeros, and no more than that."""
    params, plain = parameters(), parameters()
    opt = make(params, lr=0.0, weight_decay=0.3, rho=RHO, **more)
    before = snapshot(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(map(same_bits, params, before))
    state = opt.state_dict()["state"]
    assert state.keys() == set(range(len(params)))
    assert all(not any(map(torch.any, entry.values())) for entry in state.values())
    opt.param_groups[0]["lr"] = 0.1
    other = make(plain, lr=0.1, weight_decay=0.3, rho=RHO, **more)
    for each, own in ((opt, params), (other, plain)):
        each.step(closure_of(each, own))
    assert all(map(same_bits, params, plain))


def test_lr_zero_does_not_stand_in_for_an_ascent() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.0, momentum=0.9, rho=RHO)
    closure = closure_of(opt, params)
    closure()
    with pytest.raises(RuntimeError, match="needs 1 ascents before it, and 0 were taken"):
        opt.step()
    assert len(opt.state) == 0
    opt.step(closure)
    other, plain = ef.USAM(parameters(), lr=0.1, momentum=0.9, rho=RHO), None
    plain = other.param_groups[0]["params"]
    other.step(closure_of(other, plain))
    for p, q in zip(params, plain, strict=True):
        assert same_bits(opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def test_every_lr_zero_needs_no_gradient() -> None:
    opt = ef.USAM(parameters(), lr=0.0, momentum=0.9, rho=RHO)
    opt.step()
    assert len(opt.state) == 0


def test_one_lr_that_is_not_zero_wants_its_gradient() -> None:
    params = parameters()
    groups = [{"params": params[:3], "lr": 0.0}, {"params": params[3:]}]
    opt = ef.USAM(groups, lr=0.1, rho=RHO)
    for p in params:
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="needs 1 ascents before it, and 0 were taken"):
        opt.step()


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("make", [ef.SGD, ef.USAM, torch.optim.SGD])
def test_distributed_checkpointing_primes_it(make: type, kind: str) -> None:
    """The real thing, in one process: it sets every lr to 0 or torch.tensor(0.0), and steps."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 2)
    before = snapshot(list(model.parameters()))
    lr = 0.1 if kind == "float" else torch.tensor(0.1)
    opt = make(model.parameters(), lr=lr, momentum=0.9)
    saved = get_optimizer_state_dict(model, opt)
    assert saved["state"].keys() == {"weight", "bias"}
    assert not saved["state"]["weight"]["momentum_buffer"].any()
    assert all(map(same_bits, list(model.parameters()), before))
    assert opt.param_groups[0]["lr"] == lr


BAD_OF_ADAMW: dict[str, dict[str, Any]] = {
    "lr must be at least 0 and finite, and is -1": {"lr": -1},
    "eps must be at least 0 and finite, and is -1": {"eps": -1},
    "weight_decay must be at least 0 and finite, and is nan": {"weight_decay": float("nan")},
    "rho must be at least 0 and finite, and is inf": {"rho": float("inf")},
    "betas must be at least 0 and below 1, and one is 1": {"betas": (1, 0.9)},
    "betas must be at least 0 and below 1, and one is -1": {"betas": (0.9, -1)},
}
BAD_OF_USAM: dict[str, dict[str, Any]] = {
    "lr must be at least 0 and finite, and is -0.1": {"lr": -0.1},
    "lr must be at least 0 and finite, and is nan": {"lr": float("nan")},
    "lr must be at least 0 and finite, and is inf": {"lr": float("inf")},
    "momentum must be at least 0 and finite, and is -0.9": {"momentum": -0.9},
    "weight_decay must be at least 0 and finite, and is -1": {"weight_decay": -1},
    "rho must be at least 0 and finite, and is -0.05": {"rho": -0.05},
    "rho must be a number or a one-element tensor": {"rho": torch.ones(2)},
    "lr must be a number or a one-element tensor": {"lr": torch.ones(2)},
    "nesterov needs momentum > 0 and dampening 0": {"nesterov": True},
    "needs momentum > 0 and dampening 0": {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
}


@pytest.mark.parametrize(
    ("make", "message", "bad"),
    [(ef.AdamW, *item) for item in BAD_OF_ADAMW.items()]
    + [(ef.USAM, *item) for item in BAD_OF_USAM.items()],
)
def test_values_out_of_range(make: Any, message: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters(), **bad)
    opt = make(parameters()[:2], lr=0.1, rho=0.05)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": parameters()[2:], **bad})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": parameters()[2:]})
    assert opt.param_groups[1]["rho"] == 0.05


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'fast': choose one of .*'reference'"):
        ef.USAM(parameters(), backend="fast")


def test_nothing_unknown_is_taken() -> None:
    with pytest.raises(TypeError, match="SGD got an unexpected keyword argument 'fuse'"):
        ef.SGD(parameters(), lr=0.1, fuse=True)
    with pytest.raises(TypeError, match="rho"):
        ef.SGD(parameters(), lr=0.1, rho=0.1)


def test_a_hyperparameter_of_another_kind_names_itself_when_it_is_used() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    opt.param_groups[0]["lr"] = torch.tensor(1)
    before = snapshot(params)
    with pytest.raises(TypeError, match="lr must be a number or a one-element float32 or float64"):
        opt.step(closure_of(opt, params))
    assert all(map(same_bits, params, before))
    assert not opt.perturbed


@pytest.mark.parametrize(
    ("make", "name"), [(ef.SGD, "lr"), (ef.AdamW, "lr"), (ef.AdamW, "betas"), (ef.AdamW, "eps")]
)
def test_a_tensor_that_kernels_cannot_accept_is_refused_before_the_first_group_steps(
    make: Any, name: str
) -> None:
    params = parameters()
    opt = make([{"params": [p]} for p in params], lr=0.1)
    whole = torch.tensor(1)
    opt.param_groups[-1][name] = (whole, 0.9) if name == "betas" else whole
    before = snapshot(params)
    for p in params:
        p.grad = torch.ones_like(p)
    message = f"{name} must be a number or a one-element float32 or float64"
    with pytest.raises(TypeError, match=message):
        opt.step()
    assert all(map(same_bits, params, before))
