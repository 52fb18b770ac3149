"""Parameters sharded along two dimensions of a mesh, on four processes: FSDP2 x TP, and HSDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import eigenfilter as ef
from optimizers.distributed_problem import OPTIMIZERS, SETTINGS, evaluation, full, train
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

WORLD = 4


def wide() -> nn.Sequential:
    """Blocks that two processes can share evenly, as tensor parallelism needs."""
    torch.manual_seed(17)
    first, second = nn.Linear(6, 8), nn.Linear(8, 4)
    return nn.Sequential(
        nn.Sequential(first, nn.Tanh()), nn.Sequential(second, nn.Softsign())
    ).double()


def two_dimensional(kind: str) -> nn.Sequential:
    model = wide()
    if kind == "FSDP2 x TP":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"0.0": ColwiseParallel(), "1.0": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        mesh = mesh["data"]
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def own_samples(rank: int, kind: str) -> slice:
    """Processes that share a sample's tensors see the same samples."""
    if kind == "FSDP2 x TP":
        replica = rank // 2
        return slice(4 * replica, 4 * replica + 4)
    return slice(2 * rank, 2 * rank + 2)


def train_sharded(rank: int, kind: str, name: str) -> list[Tensor]:
    model = two_dimensional(kind)
    opt = OPTIMIZERS[name](model.parameters())
    params = train(opt, model, own_samples(rank, kind))
    assert all(len(p.placements) == 2 for p in model.parameters())
    return params


@pytest.mark.parametrize("kind", ["FSDP2 x TP", "HSDP"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_single_processs_run(run_distributed: RunDistributed, kind: str, name: str) -> None:
    results = run_distributed(train_sharded, WORLD, kind, name)
    model = wide()
    expected = train(OPTIMIZERS[name](model.parameters()), model, slice(None))
    rounding = 1e-7 if name == "difference" else 1e-12
    for result in results:
        torch.testing.assert_close(result, expected, rtol=rounding, atol=rounding)
        assert all(map(torch.equal, result, results[0]))


def norm_of_the_descent(rank: int, kind: str) -> dict[str, Any]:
    model = two_dimensional(kind)
    opt = ef.SAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, own_samples(rank, kind))
    before = full(model.parameters())
    closure()
    opt.ascend()
    length = torch.stack(
        [(p - b).square().sum() for p, b in zip(full(model.parameters()), before, strict=True)]
    )
    closure()
    norm = opt.clip_grad_norm_(0.125).item()
    clipped = torch.cat([g.flatten() for g in full([p.grad for p in model.parameters()])])
    return {"length": length.sum().sqrt().item(), "norm": norm, "clipped": clipped.norm().item()}


@pytest.mark.parametrize("kind", ["FSDP2 x TP", "HSDP"])
def test_norms_are_those_of_the_whole_gradient(run_distributed: RunDistributed, kind: str) -> None:
    model = wide()
    opt = ef.SAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, slice(None))
    closure()
    opt.ascend()
    closure()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for result in run_distributed(norm_of_the_descent, WORLD, kind):
        assert result["length"] == pytest.approx(SETTINGS["rho"], rel=1e-10)
        assert result["norm"] == pytest.approx(expected, rel=1e-10)
        assert result["clipped"] == pytest.approx(0.125, rel=1e-4)
