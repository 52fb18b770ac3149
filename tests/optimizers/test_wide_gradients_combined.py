"""Wide gradients that are scaled, skipped, clipped, released, sharded, or made by autograd."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import backward, snapshot
from optimizers.wide_gradients import (
    SETTINGS,
    backends,
    fill_gradients,
    mixtures,
    pairs,
    run,
    widened,
)


@backends
@pairs
def test_only_steps_that_are_not_finite_are_skipped(
    dtype: torch.dtype, wide: torch.dtype, big: float, backend_name: str
) -> None:
    params = widened(dtype, wide, mixed=True)
    opt = ef.USAM(params, lr=0.1 / big, rho=RHO / big, skip_nonfinite=True, backend=backend_name)
    run(opt, params, 2, big)
    assert opt.skipped == 0
    before = snapshot(params)
    for phase in ("ascent", "descent"):
        fill_gradients(params, big)
        if phase == "descent":
            params[3].grad[0, 0] = torch.inf
        opt.ascend() if phase == "ascent" else opt.step()
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))


@mixtures
@pairs
def test_a_grad_scaler_finds_what_is_not_finite_and_nothing_else(
    dtype: torch.dtype, wide: torch.dtype, big: float, mixed: bool
) -> None:
    """Its scale takes the gradients beyond the parameter's range, but not beyond theirs."""
    results = []
    for scale in (1.0, 2.0**18):
        params = widened(dtype, wide, mixed=False)
        if mixed:
            params[1].grad_dtype = params[1].dtype
        opt = ef.USAM(params, lr=0.1, momentum=0.8, rho=RHO)
        scaler = GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            for phase in ("ascent", "descent"):
                fill_gradients(params, scaler.scale(torch.ones(())).item())
                if mixed:  # within its range: of a gradient that underflows without a scale
                    params[1].grad = torch.zeros_like(params[1])
                if phase == "ascent":
                    opt.ascend(grad_scaler=scaler)
                else:
                    scaler.step(opt)
                    scaler.update()
        assert opt.skipped == 0
        assert scaler.get_scale() == scale
        results.append(params)
    assert all(map(same_bits, *results))


@pairs
def test_clipping_takes_the_norm_of_wide_gradients(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    params = widened(dtype, wide, mixed=False)
    opt = ef.SGD(params, lr=0.5)
    before = snapshot(params)
    fill_gradients(params, big)
    grads = [p.grad.double().clone() for p in params]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    result = opt.clip_grad_norm_(1.0)
    torch.testing.assert_close(result.double(), norm, rtol=1e-6, atol=0)
    opt.step()
    for p, b, g in zip(params, before, grads, strict=True):
        expected = b.double() - 0.5 * g / norm
        torch.testing.assert_close(p.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@backends
@pairs
def test_gradients_are_released_in_their_dtype(
    dtype: torch.dtype, wide: torch.dtype, big: float, backend_name: str
) -> None:
    results = []
    for release in (False, True):
        params = widened(dtype, wide, mixed=True)
        opt = ef.USAM(
            params, lr=0.1, momentum=0.8, rho=RHO, release_gradients=release, backend=backend_name
        )

        def closure(params: Sequence[Tensor] = params, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = torch.stack([(p.double() ** 2 * 1.3 - p.double()).sum() for p in params]).sum()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        results.append(params)
    assert all(map(same_bits, *results))


@pairs
def test_autograd_makes_wide_gradients_that_are_taken(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    """The gradients that backward leaves in `grad_dtype`, with an exact product too."""
    for options in ({"hvp": "autograd"}, {"hvp": "finite_difference"}):
        params = widened(dtype, wide, mixed=True)
        before = snapshot(params)
        opt = ef.HessianUSAM(params, lr=0.1, rho=0.2, **options)

        def closure(params: Sequence[Tensor] = params, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            flat = torch.cat([p.to(wide).flatten() for p in params])
            loss = (flat**2).sum()
            backward(opt, loss)
            return loss

        opt.step(closure)
        for p, x in zip(params, before, strict=True):
            x = x.double()
            y = x + 0.2 * 2 * (2 * x)  # rho H g
            tolerance = 0.05 if options["hvp"] == "finite_difference" else 0.0
            torch.testing.assert_close(
                p.double(),
                x - 0.1 * 2 * y,
                rtol=4 * torch.finfo(dtype).eps + tolerance,
                atol=4 * torch.finfo(dtype).eps,
            )


@pairs
def test_a_wrapped_optimizer_ascends_along_wide_gradients(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    results = []
    for factor in (1.0, big):
        params = widened(dtype, wide, mixed=False)
        base = torch.optim.SGD(params, lr=0.1 / factor, foreach=False)
        opt = ef.SharpnessAware(base, "usam", RHO / factor, skip_nonfinite=True)
        run(opt, params, 3, factor)
        assert opt.skipped == 0
        results.append(params)
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large)
        assert large.isfinite().all()


@pairs
def test_state_keeps_the_parameters_dtype_and_resumes(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    for setting in ("nesterov", "adamw", "hessian"):
        make, options = SETTINGS[setting]
        params = widened(dtype, wide, mixed=True)
        opt = make(params, **options)
        run(opt, params, 2)
        for p in params:
            for key, value in opt.state[p].items():
                assert value.dtype == (torch.float32 if key == "step" else dtype)
        twins = widened(dtype, wide, mixed=True)
        with torch.no_grad():
            for q, p in zip(twins, params, strict=True):
                q.copy_(p)
        other = make(twins, **options)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        for o, some in ((opt, params), (other, twins)):
            run(o, some, 2)
        assert all(map(same_bits, params, twins))


@pytest.mark.distributed
@pairs
def test_sharded_parameters(dtype: torch.dtype, wide: torch.dtype, big: float) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for make, power in ((ef.USAM, -1), (ef.SAM, 0), (ef.HessianUSAM, -2)):
            results = []
            for sharded in (False, True):
                params = []
                for i, t in enumerate((torch.linspace(-1, 2, 30).view(6, 5), torch.ones(5))):
                    x = t.to(dtype)
                    p = nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]) if sharded else x)
                    p.grad_dtype = wide if i == 0 else None
                    params.append(p)
                opt = make(params, lr=0.1 / big, rho=RHO * big**power)
                for _ in range(2):
                    for _ in range(3 if make is ef.HessianUSAM else 2):
                        for p in params:
                            p.grad = (p.detach().to(wide) * 1.3 - 0.7) * big
                        opt.ascend() or opt.step()
                results.append([p.to_local() if sharded else p for p in params])
            assert all(map(same_bits, *results))
            assert all(p.isfinite().all() for p in results[1])
    finally:
        dist.destroy_process_group()
