"""Two processes, each with its data, measure the sharpness of one process with all data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import monitor_workers as workers
from curvature.networks import dense
from curvature.sharded_workers import network, samples

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(workers.main, args=(str(folder),), nprocs=workers.WORLD)
    return folder


def results(folder: Path, scenario: str) -> Any:
    """The results of both processes, which are equal."""
    first, second = (torch.load(folder / f"{rank}.pt")[scenario] for rank in range(workers.WORLD))
    assert not isinstance(first, str), first
    assert first[0] == second[0]  # the checks
    assert first[3] == second[3]  # the learning rates
    return first


def hessian(values: list[Tensor]) -> Tensor:
    model = network()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    return dense(model, *samples(), loss_fn=nn.functional.mse_loss)


def test_under_ddp_it_sees_all_data_and_all_processes_act(folder: Path) -> None:
    checks, values, _, lrs = results(folder, "replicas")
    exact = torch.linalg.eigvalsh(hessian(values))[-1].item()
    assert checks[-1]["sharpness"] == pytest.approx(exact, rel=1e-6)
    assert checks[0]["sharpness"] > checks[0]["edge"]
    assert lrs[0] < 0.6


def test_under_fsdp2_it_sees_adamws_groups(folder: Path) -> None:
    checks, values, v, _ = results(folder, "shards")
    lr, (beta1, beta2) = workers.ADAMW["lr"], workers.ADAMW["betas"]
    P = torch.cat([part.reshape(-1) for part in v])
    P = (P / (1 - beta2**6)).sqrt() + workers.ADAMW["eps"]
    decay = torch.full_like(P, 0.01)
    decay[: values[0].numel()] = 0.1
    root = (lr * (1 - beta1) / (1 + beta1) / P).sqrt()
    step = root[:, None] * hessian(values) * root + (lr * decay).diag()
    exact = torch.linalg.eigvalsh(step)[-1].item()
    assert checks[-1]["sharpness"] == pytest.approx(exact, rel=1e-5)
    assert {check["edge"] for check in checks} == {2.0}


@pytest.mark.parametrize("scenario", workers.SCENARIOS)
def test_the_first_process_writes(folder: Path, scenario: str) -> None:
    lines = (folder / f"{scenario}.jsonl").read_text().splitlines()
    checks, *_ = results(folder, scenario)
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    assert [json.loads(line)["sharpness"] for line in lines] == [c["sharpness"] for c in checks]
