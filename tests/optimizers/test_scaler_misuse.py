"""A GradScaler that takes part in half of a step is refused, and leaves nothing behind."""

import pytest
import torch

import eigenfilter


def problem():
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = eigenfilter.USAM([x], lr=0.1, rho=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def closure(scale: bool) -> None:
        opt.zero_grad()
        loss = (x**2).sum()
        (scaler.scale(loss) if scale else loss).backward()

    return x, opt, scaler, closure


def test_an_ascent_without_the_scaler_of_the_step() -> None:
    _, opt, scaler, closure = problem()
    closure(True)
    assert opt.ascend()
    closure(True)
    with pytest.raises(RuntimeError, match="must agree on the scaler"):
        scaler.step(opt)


def test_a_step_without_the_scaler_of_its_ascents() -> None:
    _, opt, scaler, closure = problem()
    closure(True)
    assert opt.ascend(grad_scaler=scaler)
    closure(True)
    with pytest.raises(RuntimeError, match="must agree on the scaler"):
        opt.step()


def test_a_closure_passed_to_the_scaler() -> None:
    _, opt, scaler, closure = problem()
    closure(True)
    with pytest.raises(RuntimeError, match="cannot step with a closure"):
        scaler.step(opt, lambda: closure(False))


def test_a_refused_step_leaves_no_scale_behind() -> None:
    x, opt, scaler, closure = problem()
    closure(True)
    with pytest.raises(RuntimeError, match="ascents before it"):
        scaler.step(opt)
    before = x.detach().clone()
    opt.step(lambda: closure(False))
    perturbed = before * (1 - 0.1 * 2 * (1 + 0.05 * 2))
    torch.testing.assert_close(x.detach(), perturbed)


@pytest.mark.parametrize("first", [False, True])
def test_one_of_two_ascents_without_the_scaler(first: bool) -> None:
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = eigenfilter.TwoStepUSAM([x], lr=0.1, rho=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = x.detach().clone()
    scaler.scale((x**2).sum()).backward()
    assert opt.ascend(grad_scaler=scaler if first else None)
    scaler.scale((x**2).sum()).backward()
    there = x.detach().clone()
    with pytest.raises(RuntimeError, match="must agree on the scaler"):
        opt.ascend(grad_scaler=None if first else scaler)
    assert torch.equal(x.detach(), there)
    opt.restore()
    assert torch.equal(x.detach(), before)
