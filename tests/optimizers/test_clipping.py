"""clip_grad_norm_ clips what the descent takes."""

from __future__ import annotations

import pytest
import torch
from torch.amp import GradScaler

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import closure_of, loss_of, parameters, snapshot

MAX_NORM = 0.25


def norm(params: list) -> float:
    return torch.cat([p.grad.flatten() for p in params]).norm().item()


def at_the_descent(scaler: GradScaler | None = None) -> tuple[ef.USAM, list]:
    params = parameters()
    opt = ef.USAM([{"params": params[:3]}, {"params": params[3:]}], lr=0.1, rho=RHO)
    for _ in range(2):
        opt.zero_grad()
        loss = loss_of(params)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if opt.phase == "ascent":
            opt.ascend(grad_scaler=scaler)
    assert opt.phase == "descent"
    return opt, params


def test_over_all_groups_as_torch_clips() -> None:
    opt, params = at_the_descent()
    grads, total = snapshot([p.grad for p in params]), norm(params)
    assert total > MAX_NORM
    before = opt.clip_grad_norm_(MAX_NORM)
    assert before.item() == pytest.approx(total, rel=1e-12)
    assert norm(params) == pytest.approx(MAX_NORM, rel=1e-5)
    for p, g in zip(params, grads, strict=True):
        p.grad, clipped = g, p.grad
        torch.testing.assert_close(clipped, g * (MAX_NORM / total), rtol=1e-4, atol=1e-12)
    expected = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
    torch.testing.assert_close(before, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("dtype", "wide", "size"),
    [
        (torch.float16, torch.float16, 2e4),
        (torch.float16, torch.float32, 1e5),
        (torch.bfloat16, torch.bfloat16, 3e38),
        (torch.bfloat16, torch.float32, 3e38),
        (torch.float32, torch.float32, 3e38),
        (torch.float32, torch.float64, 1e39),
    ],
)
def test_a_norm_that_their_dtype_does_not_hold(
    dtype: torch.dtype, wide: torch.dtype, size: float
) -> None:
    """Infinite in the gradients' dtype, it would make them 0."""
    params = [torch.nn.Parameter(torch.ones(50, dtype=dtype)) for _ in range(2)]
    for p in params:
        p.grad_dtype = wide
        p.grad = torch.full((50,), size, dtype=wide)
    total = params[0].grad[0].item() * 10
    result = ef.SGD(params, lr=0.1).clip_grad_norm_(1.0)
    assert result.item() == pytest.approx(total, rel=1e-12)
    for p in params:
        torch.testing.assert_close(p.grad, torch.full_like(p.grad, 0.1), rtol=1e-2, atol=0.0)


def test_no_gradients_have_no_norm() -> None:
    assert ef.SGD(parameters(), lr=0.1).clip_grad_norm_(1.0) == 0


def test_a_small_gradient_stays() -> None:
    opt, params = at_the_descent()
    grads = snapshot([p.grad for p in params])
    opt.clip_grad_norm_(1e9)
    assert all(map(same_bits, [p.grad for p in params], grads))


def test_with_a_scaler_the_norm_is_that_of_the_gradient() -> None:
    scaler = GradScaler("cpu", init_scale=1024.0)
    _, plain = at_the_descent()
    opt, params = at_the_descent(scaler)
    assert norm(params) == pytest.approx(1024 * norm(plain), rel=1e-12)
    before = opt.clip_grad_norm_(MAX_NORM, grad_scaler=scaler)
    assert before.item() == pytest.approx(norm(plain), rel=1e-12)
    assert norm(params) == pytest.approx(MAX_NORM, rel=1e-5)


def test_a_clipped_step_is_shorter_by_as_much() -> None:
    moves = []
    for max_norm in (1e9, MAX_NORM):
        opt, params = at_the_descent()
        total = opt.clip_grad_norm_(max_norm).item()
        opt.step()
        start = parameters()
        moves.append(torch.cat([(p - s).flatten() for p, s in zip(params, start, strict=True)]))
    torch.testing.assert_close(moves[1], moves[0] * (MAX_NORM / total), rtol=1e-4, atol=1e-12)


def test_sgd_clips_at_any_time() -> None:
    params = parameters()
    opt = ef.SGD(params, lr=0.1)
    closure_of(opt, params)()
    opt.clip_grad_norm_(MAX_NORM)
    assert norm(params) == pytest.approx(MAX_NORM, rel=1e-5)


@pytest.mark.parametrize("dtypes", [[torch.float64], [torch.float64, torch.float32]])
@pytest.mark.parametrize("size", [1e160, 1e200])
def test_float64_gradients_whose_squares_overflow(dtypes: list[torch.dtype], size: float) -> None:
    params = [torch.nn.Parameter(torch.ones(50, dtype=dtype)) for dtype in dtypes]
    for p in params:
        p.grad_dtype = torch.float64
        p.grad = torch.full((50,), size, dtype=torch.float64)
    total = size * (50 * len(params)) ** 0.5
    opt = ef.SAM(params, lr=0.1, rho=0.5)
    opt.ascend()
    for p in params:
        expected = torch.full_like(p, 1 + 0.5 * size / total)
        torch.testing.assert_close(p.detach(), expected)
        p.grad = torch.full((50,), size, dtype=torch.float64)
    assert opt.clip_grad_norm_(1.0).item() == pytest.approx(total, rel=1e-14)
    for p in params:
        expected = torch.full_like(p.grad, size / total)
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0.0)


def test_gradients_with_strides_of_their_own() -> None:
    """Of any layout and dtype that a step accepts; they are clipped in place."""
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))]
    opt = ef.SGD(params, lr=0.1)
    params[0].grad = torch.arange(12.0).reshape(4, 3).t()
    params[1].grad = torch.ones(10)[::2]
    expected = torch.cat([p.grad.flatten() for p in params]).norm()
    assert float(opt.clip_grad_norm_(1.0)) == pytest.approx(float(expected))
    total = torch.cat([p.grad.flatten() for p in params]).norm()
    assert float(total) == pytest.approx(1.0, rel=1e-5)
