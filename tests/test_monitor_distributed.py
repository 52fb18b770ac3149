"""Two processes, each with its data, measure the sharpness of one process with all data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
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
from eigenfilter.curvature import HessianOperator
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

ADAMW = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the monitor of each scenario writes its log."""
    return tmp_path_factory.mktemp("logs")


def own_samples(rank: int) -> tuple[Tensor, Tensor]:
    x, y = samples()
    return x[share(rank, 2)], y[share(rank, 2)]


def train(model: nn.Module, opt: Any, op: HessianOperator, rank: int, log: Path) -> Any:
    """Train a little; return the checks, the parameters, and what else the optimizer has."""
    monitor = ef.SharpnessMonitor(op, opt, 2, tol=1e-8, log=log, on_edge="lower_lr")
    x, y = own_samples(rank)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(6):
        opt.step(closure)
        monitor.step()
    checks = [asdict(check) | {"seconds": None} for check in monitor.history]
    values = [whole(p) for p in op.params]
    v = [whole(opt.state[p]["exp_avg_sq"]) for p in op.params if "exp_avg_sq" in opt.state[p]]
    return checks, values, v, [group["lr"] for group in opt.param_groups]


def whole(t: Tensor) -> Tensor:
    full = t.full_tensor() if isinstance(t, dist.tensor.DTensor) else t
    return full.detach().clone()


def assert_equal_checks(results: list[Any]) -> Any:
    """Return the results of the first process: all have the same checks and learning rates."""
    first, second = results
    assert first[0] == second[0]
    assert first[3] == second[3]
    return first


def hessian(values: list[Tensor]) -> Tensor:
    model = network()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    return dense(model, *samples(), loss_fn=nn.functional.mse_loss)


def train_replicas(rank: int, folder: Path) -> Any:
    """DistributedDataParallel, past its edge from the first check on."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), lr=0.6, rho=0.05)
    data = own_samples(rank)
    op = HessianOperator(model, nn.functional.mse_loss, data, process_group=dist.group.WORLD)
    return train(model, opt, op, rank, folder / "replicas.jsonl")


def test_under_ddp_it_sees_all_data_and_all_processes_act(
    run_distributed: RunDistributed, folder: Path
) -> None:
    results = run_distributed(train_replicas, 2, folder)
    checks, values, _, lrs = assert_equal_checks(results)
    exact = torch.linalg.eigvalsh(hessian(values))[-1].item()
    assert checks[-1]["sharpness"] == pytest.approx(exact, rel=1e-6)
    assert checks[0]["sharpness"] > checks[0]["edge"]
    assert lrs[0] < 0.6


def train_shards(rank: int, folder: Path) -> Any:
    """FSDP2, and AdamW with groups that differ."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    first, *rest = model.parameters()
    opt = ef.AdamW([{"params": [first], "weight_decay": 0.1}, {"params": rest}], **ADAMW)
    data = own_samples(rank)
    op = HessianOperator(model, nn.functional.mse_loss, data, engine="finite_difference")
    return train(model, opt, op, rank, folder / "shards.jsonl")


def test_under_fsdp2_it_sees_adamws_groups(run_distributed: RunDistributed, folder: Path) -> None:
    checks, values, v, _ = assert_equal_checks(run_distributed(train_shards, 2, folder))
    lr, (beta1, beta2) = ADAMW["lr"], ADAMW["betas"]
    P = torch.cat([part.reshape(-1) for part in v])
    P = (P / (1 - beta2**6)).sqrt() + ADAMW["eps"]
    decay = torch.full_like(P, 0.01)
    decay[: values[0].numel()] = 0.1
    root = (lr * (1 - beta1) / (1 + beta1) / P).sqrt()
    step = root[:, None] * hessian(values) * root + (lr * decay).diag()
    exact = torch.linalg.eigvalsh(step)[-1].item()
    assert checks[-1]["sharpness"] == pytest.approx(exact, rel=1e-5)
    assert {check["edge"] for check in checks} == {2.0}


@pytest.mark.parametrize("scenario", [train_replicas, train_shards], ids=["replicas", "shards"])
def test_the_first_process_writes(
    run_distributed: RunDistributed, folder: Path, scenario: Any
) -> None:
    checks, *_ = assert_equal_checks(run_distributed(scenario, 2, folder))
    log = folder / f"{scenario.__name__.removeprefix('train_')}.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["sharpness"] for line in lines] == [check["sharpness"] for check in checks]
