"""Scenarios that the two processes of `test_monitor_distributed.py` run, with their results."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
import group
from curvature.sharded_workers import network, samples, share
from eigenfilter.curvature import HessianOperator

WORLD = 2
ADAMW = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3}


def trained(model: nn.Module, opt: Any, op: HessianOperator, rank: int, log: Path) -> Any:
    """Train a little; return the checks, the parameters, and what else the optimizer has."""
    monitor = ef.SharpnessMonitor(op, opt, 2, tol=1e-8, log=log, on_edge="lower_lr")
    x, y = (t[share(rank, WORLD)] for t in samples())

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


def replicas(rank: int, folder: Path) -> Any:
    """DistributedDataParallel, past its edge from the first check on."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), lr=0.6, rho=0.05)
    data = tuple(t[share(rank, WORLD)] for t in samples())
    op = HessianOperator(model, nn.functional.mse_loss, data, process_group=dist.group.WORLD)
    return trained(model, opt, op, rank, folder / "replicas.jsonl")


def shards(rank: int, folder: Path) -> Any:
    """FSDP2, and AdamW with groups that differ."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    first, *rest = model.parameters()
    opt = ef.AdamW([{"params": [first], "weight_decay": 0.1}, {"params": rest}], **ADAMW)
    data = tuple(t[share(rank, WORLD)] for t in samples())
    op = HessianOperator(model, nn.functional.mse_loss, data, engine="finite_difference")
    return trained(model, opt, op, rank, folder / "shards.jsonl")


SCENARIOS = {"replicas": replicas, "shards": shards}


def main(rank: int, folder: str) -> None:
    """Run every scenario as one of the processes; write its result, or its traceback."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    result: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        try:
            result[name] = scenario(rank, Path(folder))
        except Exception:
            result[name] = traceback.format_exc()
    torch.save(result, Path(folder, f"{rank}.pt"))
    group.leave()
