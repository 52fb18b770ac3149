"""Parameters never change storage, and autograd is told that their values did."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eigenfilter as ef
from cases import RHO
from optimizers.problems import closure_of, parameters

OPTIMIZERS = {
    "sgd": lambda params: ef.SGD(params, lr=0.1, momentum=0.9),
    "usam": lambda params: ef.USAM(params, lr=0.1, momentum=0.9, rho=RHO),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_addresses_strides_and_momenta_stay(make, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    opt = make(params)
    closure = closure_of(opt, params)
    places = [(p.data_ptr(), p.stride(), p.dtype) for p in params]
    opt.step(closure)
    momenta = [opt.state[p]["momentum_buffer"] for p in params]
    for p, m in zip(params, momenta, strict=True):
        assert (m.dtype, m.shape, m.stride()) == (p.dtype, p.shape, p.stride())
        assert not m.requires_grad
    for _ in range(3):
        opt.step(closure)
    assert [(p.data_ptr(), p.stride(), p.dtype) for p in params] == places
    assert all(opt.state[p]["momentum_buffer"] is m for p, m in zip(params, momenta, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in params)


def test_every_change_bumps_the_version() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)
    for name in ("ascend", "step", "ascend", "restore"):
        closure()
        versions = [p._version for p in params]
        getattr(opt, name)()
        assert all(p._version > v for p, v in zip(params, versions, strict=True)), name


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_graph_from_before_the_step_refuses_to_run(make) -> None:
    params = parameters()
    opt = make(params)
    stale = sum((p * p).sum() for p in params)
    opt.step(closure_of(opt, params))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_a_graph_from_x_refuses_to_run_at_the_perturbed_point() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=0.1, rho=RHO)
    closure_of(opt, params)()
    stale = sum((p * p).sum() for p in params)
    assert opt.ascend()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    opt.restore()


def test_no_step_is_recorded_by_autograd() -> None:
    params = parameters()
    opt = ef.USAM(params, lr=torch.tensor(0.1, requires_grad=True), momentum=0.9, rho=RHO)
    opt.step(closure_of(opt, params))
    assert all(p.is_leaf and p.grad_fn is None for p in params)


class Allocations(TorchDispatchMode):
    """Notes the tensors of more than one element that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() > 1:
            self.created.append(str(func))
        return result


def test_a_step_makes_no_tensors_but_in_its_first_time() -> None:
    """Memory: parameters, gradients, momentum and one backup, allocated once."""
    params = parameters()
    opt = ef.USAM(params, lr=0.1, momentum=0.9, rho=RHO, skip_nonfinite=True)
    closure = closure_of(opt, params)
    constructors = []
    for _ in range(3):
        closure()
        with Allocations() as ascent:
            opt.ascend()
        closure()
        with Allocations() as descent:
            opt.step()
        constructors.append((ascent.created, descent.created))
    assert any("empty" in name for name in constructors[0][0])  # backups
    assert any("zeros" in name or "empty" in name for name in constructors[0][1])  # momentum
    assert constructors[1:] == [([], [])] * 2
