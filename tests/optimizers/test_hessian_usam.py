"""Hessian USAM's product: how exact it is, what it asks for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import (
    SETTINGS,
    backward,
    closure_of,
    distance,
    loss_of,
    parameters,
    snapshot,
)

HEAVY = SETTINGS["heavy ball"]


# How exact the finite difference is.


def network(dtype: torch.dtype) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Parameters of a small tanh network and its loss on 32 samples; the same numbers always."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(32, 6, generator=generator)
    targets = torch.stack([inputs.sin().sum(dim=1), inputs.prod(dim=1)], dim=1)
    torch.manual_seed(5)
    layers = nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2)
    model = nn.Sequential(*layers).to(dtype)
    inputs, targets = inputs.to(dtype), targets.to(dtype)
    return list(model.parameters()), lambda: (model(inputs) - targets).square().mean()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def error_of_product(dtype: torch.dtype, fd_step: float | None = None) -> float:
    """Relative error of H g, from a perturbation so long that rounding of the point vanishes."""
    exact, loss = network(torch.float64)
    grads = torch.autograd.grad(loss(), exact, create_graph=True)
    product = flat(torch.autograd.grad(grads, exact, [g.detach() for g in grads]))
    params, loss = network(dtype)
    rho, x = 1e4, flat(params)
    opt = ef.HessianUSAM(params, lr=0.1, rho=rho, fd_step=fd_step)
    for _ in range(2):
        opt.zero_grad()
        loss().backward()
        opt.ascend()
    return ((flat(params) - x) / rho - product).norm().item() / product.norm().item()


@pytest.mark.parametrize(("dtype", "measured"), [(torch.float64, 3.1e-8), (torch.float32, 7.2e-4)])
def test_the_default_step_leaves_half_of_the_digits(dtype: torch.dtype, measured: float) -> None:
    """Measured, relative: 3.1e-8 in float64, where c = 1.5e-8; 7.2e-4 in float32, c = 3.5e-4."""
    assert error_of_product(dtype) < 3 * measured
    assert error_of_product(dtype) < min(error_of_product(dtype, c) for c in (1e-2, 1e-1))


def test_the_error_is_proportional_to_a_step_that_is_given() -> None:
    """Measured: 2.1 c, the curvature's change along the way."""
    for c in (1e-2, 1e-3, 1e-4, 1e-5):
        assert error_of_product(torch.float64, c) == pytest.approx(2.1 * c, rel=0.1)
    assert error_of_product(torch.float32, 1e-6) > 10 * error_of_product(torch.float32)  # rounding


@pytest.mark.parametrize(("hvp", "rounding"), [("autograd", 0.0), ("finite_difference", 1e-6)])
def test_parameters_that_enter_linearly_stay_in_the_ascent(hvp: str, rounding: float) -> None:
    """Their rows of the Hessian are zero, exactly: both sides of a difference are equal too."""
    curved, linear = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    opt = ef.HessianUSAM([linear, curved], lr=0.1, rho=RHO, hvp=hvp)

    def closure() -> None:
        opt.zero_grad()
        backward(opt, (curved**3).sum() + (linear * 0.25).sum())

    closure()
    while opt.ascend():
        closure()
    factor = 1 + RHO * 6 * 3
    assert torch.equal(linear, torch.ones_like(linear))
    assert distance([curved], [torch.full_like(curved, factor)]) <= rounding
    opt.step()
    assert torch.equal(linear, torch.full_like(linear, 1 - 0.1 * 0.25))
    assert distance([curved], [torch.full_like(curved, 1 - 0.1 * 3 * factor**2)]) < 1e-14 + rounding


# What it asks for.


def test_clipping_is_refused_in_both_ascents() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO)
    closure = closure_of(opt, params)
    for _ in range(2):
        closure()
        grads = snapshot([p.grad for p in params])
        with pytest.raises(RuntimeError, match="clips the descent gradient: call it after the"):
            opt.clip_grad_norm_(1e-3)
        assert all(map(same_bits, [p.grad for p in params], grads))
        opt.ascend()
    closure()
    opt.clip_grad_norm_(1e-3)
    assert flat([p.grad for p in params]).norm().item() == pytest.approx(1e-3, rel=1e-4)
    opt.step()


def test_the_graph_is_asked_for_once_a_step_and_dropped() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO, hvp="autograd")
    closure = closure_of(opt, params)
    for _ in range(2):
        assert opt.needs_graph
        closure()
        graph = weakref.ref(params[-1].grad)
        assert params[-1].grad.requires_grad
        assert opt.ascend()
        assert graph() is None
        assert not opt.needs_graph
        closure()
        assert not params[-1].grad.requires_grad
        opt.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: ef.USAM(p, lr=0.1, rho=RHO),
        lambda p: ef.HessianUSAM(p, lr=0.1, rho=RHO),
        lambda p: ef.HessianUSAM(p, lr=0.1, rho=0.0, hvp="autograd"),
    ],
)
def test_no_other_asks_for_a_graph(make: Any) -> None:
    params = parameters()
    opt = make(params)
    closure = closure_of(opt, params)
    assert not opt.needs_graph
    closure()
    while opt.ascend():
        assert not opt.needs_graph
        closure()
    opt.step()


def test_a_gradient_without_its_graph_says_how_to_keep_it() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO, hvp="autograd")
    before = snapshot(params)
    message = r"call loss\.backward\(create_graph=opt\.needs_graph\) in the closure"
    loss_of(params).backward()
    with pytest.raises(RuntimeError, match=message):
        opt.ascend()
    assert all(map(same_bits, params, before))
    assert not opt.perturbed


@pytest.mark.parametrize("last", [False, True], ids=["a layer follows", "last layer"])
@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_reentrant_checkpointing_is_named(form: str, last: bool) -> None:
    """With nothing behind it, torch differentiates around the segment without a word."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(8, 4, generator=generator)
    layers = [nn.Linear(4, 4) for _ in range(3)]
    params = [p for layer in layers for p in layer.parameters()]
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO, hvp="autograd")
    before = snapshot(params)
    reentrant = True

    def closure() -> Tensor:
        opt.zero_grad()
        h = layers[0](inputs).tanh()
        h = checkpoint(lambda h: layers[1](h).tanh(), h, use_reentrant=reentrant)
        loss = (h if last else layers[2](h)).square().mean()
        backward(opt, loss)
        return loss

    def explicit() -> None:
        with opt.evaluation():
            closure()

    with pytest.raises(RuntimeError, match=r"pass use_reentrant=False to torch\.utils\.checkpoint"):
        opt.step(closure) if form == "closure" else explicit()
    assert all(map(same_bits, params, before))
    reentrant = False
    opt.step(closure)
    assert distance(params[:4], before[:4]) > 1e-4


def test_a_micro_batch_without_its_graph_is_refused() -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO, hvp="autograd")
    before = snapshot(params)

    def closure() -> None:
        opt.zero_grad()
        backward(opt, loss_of(params))
        loss_of(params).backward()

    with pytest.raises(RuntimeError, match=r"without a graph: call loss\.backward.*every micro"):
        opt.step(closure)
    assert all(map(same_bits, params, before))


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_gradient_of_another_dtype_keeps_its_graph(skip_nonfinite: bool) -> None:
    """Where gradients are looked at too, which takes them in the parameters' dtype."""
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    p.grad_dtype = torch.bfloat16
    opt = ef.HessianUSAM([p, q], lr=0.1, rho=RHO, hvp="autograd", skip_nonfinite=skip_nonfinite)
    backward(opt, (p**3).sum() + (q**3).sum())
    assert p.grad.dtype == torch.bfloat16
    opt.ascend()
    torch.testing.assert_close(q.detach(), torch.full((4,), 1 + RHO * 6 * 3))
    torch.testing.assert_close(p, q, rtol=1e-2, atol=0.0)


def attention(p: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(p, p, 0.5 * p).square().sum()


def test_an_operation_without_a_second_derivative_is_refused_and_can_be_differenced() -> None:
    """Fused attention; its plain form, which has one, gives the step.

    A torch.autograd.Function whose backward is marked once_differentiable, or hides its graph, is
    not noticed: torch.autograd.grad passes it as a constant.
    """
    fused = [nn.Parameter(torch.randn(1, 2, 4, 8, dtype=torch.float64))]
    plain = [nn.Parameter(fused[0].detach().clone())]
    opt = ef.HessianUSAM(fused, lr=0.1, rho=RHO, hvp="autograd")

    def loss(params: Sequence[Tensor], sign: float) -> Tensor:
        return attention(params[0], SDPBackend.FLASH_ATTENTION)

    with pytest.raises(RuntimeError, match=r'second derivative, .* use hvp="finite_difference"'):
        opt.step(closure_of(opt, fused, loss_of=loss))
    assert same_bits(fused[0], plain[0])
    assert not opt.perturbed
    opt = ef.HessianUSAM(fused, lr=0.1, rho=RHO)
    opt.step(closure_of(opt, fused, loss_of=loss))
    other = ef.HessianUSAM(plain, lr=0.1, rho=RHO, hvp="autograd")
    other.step(closure_of(other, plain, loss_of=lambda p, _: attention(p[0], SDPBackend.MATH)))
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-6, atol=1e-6)


class SquaredOnce(torch.autograd.Function):
    """x^2 with a backward pass that has none itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_a_function_that_is_differentiable_once_is_refused() -> None:
    """torch.autograd.grad leaves its part of H g out without a word."""
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = ef.HessianUSAM([p], lr=0.1, rho=RHO, hvp="autograd")
    loss = SquaredOnce.apply(p).square().sum() + (p**3).sum()
    backward(opt, loss)
    with pytest.raises(RuntimeError, match=r'could not be differentiated: .*"finite_difference"'):
        opt.ascend()
    assert p.tolist() == [1.0, -2.0]
    assert not opt.perturbed


@pytest.mark.parametrize("hvp", ["finite_difference", "autograd"])
def test_nothing_of_a_step_is_kept_when_it_has_ended(hvp: str) -> None:
    params = parameters()
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO, hvp=hvp)
    closure = closure_of(opt, params)

    def containers() -> list[object]:
        return [
            value for value in vars(opt.perturbation).values() if isinstance(value, (dict, list))
        ]

    closure()
    opt.ascend()
    assert any(containers())
    opt.restore()
    assert not any(containers())
    opt.step(closure)
    assert containers()
    assert not any(containers())
