"""Parameters of every kind, and with gradients in some phases only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import SETTINGS, closure_of, distance, loss_of, parameters, snapshot

HEAVY = SETTINGS["heavy ball"]

# Indices of the problem's parameters that have a gradient in (ascent, descent).
PRESENT = {
    "ascent only": (range(6), (0, 2, 3, 5)),
    "descent only": ((0, 2, 3, 5), range(6)),
    "each somewhere": ((0, 1, 2, 3), (2, 3, 4, 5)),
    "never the same": ((0, 1, 2), (3, 4, 5)),
    "one only": ((3,), (3,)),
}


class Exact:
    """The effect of a step on single parameters: perturbed if possible, updated if possible."""

    def __init__(self, params: list) -> None:
        self.x = snapshot(params)
        self.m: list[Tensor | None] = [None] * len(params)

    def step(self, ascents: object, descents: object) -> None:
        y = self.x.copy()
        grads = self.gradient(self.x)
        for i in ascents:
            y[i] = self.x[i] + RHO * grads[i]
        grads = self.gradient(y)
        for i in descents:
            d = grads[i] + HEAVY["weight_decay"] * self.x[i]
            m, keep = self.m[i], 1 - HEAVY["dampening"]
            self.m[i] = d if m is None else HEAVY["momentum"] * m + keep * d
            self.x[i] = self.x[i] - HEAVY["lr"] * self.m[i]

    def gradient(self, points: list[Tensor]) -> list[Tensor]:
        points = [p.detach().requires_grad_() for p in points]
        return list(torch.autograd.grad(loss_of(points), points))


def evaluate(params: list, present: object) -> None:
    for p in params:
        p.grad = None
    loss_of(params).backward()
    for i, p in enumerate(params):
        if i not in present:
            p.grad = None


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", PRESENT)
def test_gradients_in_some_phases(name: str, grouped: bool) -> None:
    """Between whole steps, so that momentum is there for some and not for others."""
    ascents, descents = PRESENT[name]
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:]}] if grouped else params
    opt, exact = ef.USAM(groups, **HEAVY, rho=RHO), Exact(params)
    for moving, stepping in ((ascents, descents), (range(6), range(6)), (ascents, descents)):
        evaluate(params, moving)
        assert opt.ascend()
        evaluate(params, stepping)
        opt.step()
        exact.step(moving, stepping)
        assert not opt.perturbed
        assert distance(params, exact.x) < 1e-15
    for i, p in enumerate(params):
        if i not in descents:
            continue
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], exact.m[i])


def test_a_parameter_without_a_descent_gradient_returns_to_every_bit() -> None:
    params = parameters()
    opt = ef.USAM(params, **HEAVY, rho=RHO)
    before = snapshot(params)
    evaluate(params, range(6))
    opt.ascend()
    evaluate(params, (0, 1))
    versions = [p._version for p in params]
    opt.step()
    assert all(map(same_bits, params[2:], before[2:]))
    assert not any(map(same_bits, params[:2], before[:2]))
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    assert set(opt.state) == set(params[:2])


def test_gradients_that_come_and_go_at_random() -> None:
    params = parameters()
    opt, exact = ef.USAM(params, **HEAVY, rho=RHO), Exact(params)
    for _ in range(60):
        ascents, descents = (
            {int(i) for i in torch.randperm(6)[: torch.randint(1, 7, ())]} for _ in range(2)
        )
        evaluate(params, ascents)
        opt.ascend()
        evaluate(params, descents)
        opt.step()
        exact.step(ascents, descents)
    assert distance(params, exact.x) < 1e-13


def test_freezing_and_thawing_between_steps() -> None:
    params = parameters()
    opt = ef.USAM(params, **HEAVY, rho=RHO)
    closure = closure_of(opt, params)
    opt.step(closure)
    params[3].requires_grad_(False)
    before, momentum = snapshot(params), opt.state[params[3]]["momentum_buffer"].clone()
    opt.step(closure)
    assert same_bits(params[3], before[3])
    assert same_bits(opt.state[params[3]]["momentum_buffer"], momentum)
    params[3].requires_grad_(True)
    opt.step(closure)
    assert not same_bits(params[3], before[3])


def backward(opt: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    opt.zero_grad()
    loss.backward()
    return loss


def test_groups_and_dtypes_mix() -> None:
    """Each dtype of each group is a call of its own; the result is that of each alone."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    mixed = [p for dtype in dtypes for p in parameters(dtype)]
    opt = ef.USAM(
        [{"params": mixed[::2]}, {"params": mixed[1::2], "lr": 0.05, "rho": 0.3}],
        **HEAVY,
        rho=RHO,
    )
    alone = [parameters(dtype) for dtype in dtypes]
    others = [
        ef.USAM([{"params": p[::2]}, {"params": p[1::2], "lr": 0.05, "rho": 0.3}], **HEAVY, rho=RHO)
        for p in alone
    ]
    for _ in range(5):
        opt.step(lambda: backward(opt, sum(loss_of(mixed[i : i + 6]) for i in range(0, 24, 6))))
        for p, other in zip(alone, others, strict=True):
            other.step(closure_of(other, p))
    for i, p in enumerate(alone):
        assert all(map(same_bits, mixed[6 * i : 6 * i + 6], p))


def test_only_empty_parameters() -> None:
    p = torch.nn.Parameter(torch.zeros(0, 3))
    opt = ef.USAM([p], **HEAVY, rho=RHO, skip_nonfinite=True)
    opt.step(lambda: backward(opt, p.sum()))
    assert opt.skipped == 0
    assert opt.state[p]["momentum_buffer"].shape == (0, 3)


def test_the_same_memory_behind_two_parameters_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    q = torch.nn.Parameter(p.detach())
    with pytest.raises(ValueError, match=r"params\[[01]\] and params\[[01]\] share memory"):
        ef.USAM([p, q], lr=0.1, rho=RHO)
    base = torch.optim.SGD([p, q], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[[01]\] and params\[[01]\] share memory"):
        ef.SharpnessAware(base)
    assert "rho" not in base.param_groups[0]


UNUSABLE = {
    "sparse": (lambda: torch.ones(3).to_sparse(), "torch.float32, torch.sparse_coo"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "torch.complex64, torch.strided"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e5m2), "torch.float8_e5m2"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_parameters_no_kernel_takes(kind: str) -> None:
    make, named = UNUSABLE[kind]
    good = torch.nn.Parameter(torch.ones(2))
    bad = make().requires_grad_()
    message = rf"parameter 1 of the group is {named}.*: the optimizers take dense float32, float64"
    with pytest.raises(TypeError, match=message):
        ef.USAM([good, bad], lr=0.1)
    opt = ef.USAM([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": [good, bad]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("make", [lambda: torch.ones(8)[::2], lambda: torch.ones(1).expand(4)])
def test_parameters_that_are_not_dense_are_refused(make: Callable[[], Tensor]) -> None:
    p = make().requires_grad_()
    with pytest.raises(ValueError, match=r"params\[0\] is not dense"):
        ef.SGD([p], lr=0.1)
    opt = ef.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[1\] is not dense"):
        opt.add_param_group({"params": [p]})
    assert len(opt.param_groups) == 1


def test_parameters_on_meta_may_be_passed_and_materialized_later() -> None:
    model = torch.nn.Linear(3, 2, device="meta")
    opt = ef.USAM(model.parameters(), lr=0.1, rho=RHO)
    torch.utils.swap_tensors(model.weight, torch.nn.Parameter(torch.ones(2, 3)))
    torch.utils.swap_tensors(model.bias, torch.nn.Parameter(torch.zeros(2)))
    opt.step(lambda: backward(opt, model(torch.ones(3)).sum()))
    torch.testing.assert_close(model.bias.detach(), torch.full((2,), -0.1))
