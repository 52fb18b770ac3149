"""Float64 gradients and parameters of any size: no norm of theirs overflows or vanishes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import eigenfilter as ef

COUNTS = (50, 5000)  # elements of the parameters, each in a group of its own

backends = pytest.mark.parametrize("backend_name", ["native", "reference"])
sizes = pytest.mark.parametrize("size", [1e160, 1e200, 1e300])


def parameters(value: float, sizes: Sequence[float]) -> list[torch.nn.Parameter]:
    """Parameters of this value with gradients of these sizes and both signs."""
    params = []
    for count, size in zip(COUNTS, sizes, strict=True):
        p = torch.nn.Parameter(torch.full((count,), value, dtype=torch.float64))
        p.grad = size * torch.arange(1, count + 1).remainder(7).double().sub(3)
        params.append(p)
    return params


def groups(params: Sequence[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": [p]} for p in params]


def length(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*torch.cat(list(tensors)).tolist())


def gradients(params: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def assert_displaced(
    params: Sequence[torch.nn.Parameter], value: float, moves: list[Tensor]
) -> None:
    for p, move in zip(params, moves, strict=True):
        assert move.abs().max() > 1e-4 * abs(value)
        torch.testing.assert_close(p.detach(), value + move, rtol=1e-13, atol=0.0)


@backends
@sizes
@pytest.mark.parametrize("other", [1.0, 1e-200, 1e150])
@pytest.mark.parametrize("adaptive", [False, True])
def test_an_ascent_has_its_length(
    backend_name: str, size: float, other: float, adaptive: bool
) -> None:
    """The norm of SAM, and ASAM's with weights, over groups of different sizes."""
    params = parameters(0.5, [size, size / 1e150 * other])
    grads = gradients(params)
    opt = ef.SAM(groups(params), lr=0.1, rho=3.0, adaptive=adaptive, backend=backend_name)
    opt.ascend()
    weight = 0.5 if adaptive else 1.0
    factor = 3.0 * weight / length(grads)
    moves = [factor * g for g in grads]
    torch.testing.assert_close(params[0].detach(), 0.5 + moves[0], rtol=1e-13, atol=0.0)
    torch.testing.assert_close(params[1].detach(), 0.5 + moves[1], rtol=1e-13, atol=0.0)
    assert length(moves) == pytest.approx(3.0 * weight, rel=1e-13)


@backends
@pytest.mark.parametrize(("value", "size"), [(0.5, 1e200), (1e160, 1.0), (-1e200, 1e160)])
def test_a_finite_difference_has_its_step(backend_name: str, value: float, size: float) -> None:
    """The length of the parameters and the norm of the gradients that set it."""
    params = parameters(value, [size, size])
    grads = gradients(params)
    before = length([p.detach() for p in params])
    opt = ef.HessianUSAM(groups(params), lr=0.1, rho=0.01, fd_step=0.25, backend=backend_name)
    opt.ascend()
    factor = 0.25 * ((1 + before) / length(grads))
    assert_displaced(params, value, [factor * g for g in grads])


@backends
@pytest.mark.parametrize(
    "sizes", [(1e160, 1e160), (1e300, 1.0), (1e-170, 1e170), (1e-160, 1e-160), (1e-200, 1e-300)]
)
def test_the_norm_that_clips(backend_name: str, sizes: tuple[float, float]) -> None:
    params = parameters(1.0, sizes)
    grads = gradients(params)
    total = length(grads)
    opt = ef.SGD(groups(params), lr=0.1, backend=backend_name)
    assert opt.clip_grad_norm_(2.0).item() == pytest.approx(total, rel=1e-14, abs=0)
    for p, g in zip(params, grads, strict=True):
        expected = g * (2.0 / total) if total > 2.0 else g
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0.0)
