"""Two processes, each with its data, control the sharpness on all data together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from curvature.networks import dense
from curvature.sharded_problem import network, samples, share
from eigenfilter import filters
from eigenfilter.curvature import HessianOperator
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

TARGET = 3.5


def whole(t: Tensor) -> Tensor:
    full = t.full_tensor() if isinstance(t, dist.tensor.DTensor) else t
    return full.detach().clone()


def train(model: nn.Module, engine: str, rank: int, **options: Any) -> Any:
    """Train a little; return the checks, e, the weights at the last check, and those after it."""
    opt = ef.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = samples()
    x, y = x[share(rank, 2)], y[share(rank, 2)]
    op = HessianOperator(model, nn.functional.mse_loss, (x, y), engine=engine, **options)
    seen: list[list[Tensor]] = []
    controller = ef.SharpnessController(
        op,
        opt,
        TARGET,
        every=2,
        tol=1e-8,
        callback=lambda check: seen.append([whole(p) for p in op.params]),
    )
    for _ in range(9):
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
        opt.param_groups[0]["lr"] *= 0.9
        controller.step()
    checks = [(c.step, c.sharpness, c.edge, c.matvecs) for c in controller.history]
    group = opt.param_groups[0]
    at_y = [whole(p) for p in op.params]
    opt.eval()
    at_x = [whole(p) for p in op.params]
    return checks, (group["extrapolation"], group["lr"], controller.edge), seen, at_y, at_x


def replicas(rank: int) -> Any:
    model = DistributedDataParallel(network())
    return train(model, "cached_graph", rank, process_group=dist.group.WORLD)


def shards(rank: int) -> Any:
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return train(model, "finite_difference", rank)


@pytest.mark.parametrize("scenario", [replicas, shards])
def test_all_processes_set_the_same_edge(run_distributed: RunDistributed, scenario: Any) -> None:
    (checks, values, seen, at_y, at_x), second = run_distributed(scenario, 2)
    assert (checks, values) == second[:2]
    for weights, again in zip(at_y, second[3], strict=True):
        assert torch.equal(weights, again)
    model = network()
    with torch.no_grad():
        for p, value in zip(model.parameters(), seen[-1], strict=True):
            p.copy_(value)
    H = dense(model, *samples(), loss_fn=nn.functional.mse_loss)
    assert checks[-1][1] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-4)
    e, lr, edge = values
    assert e > 0.0
    flt = filters.HeavyBall(lr, 0.9, extrapolation=e)
    assert flt.max_eigenvalue() == pytest.approx(edge, rel=0.006)
    assert any(not torch.equal(a, b) for a, b in zip(at_x, at_y, strict=True))
