"""Scenarios that the two processes of `test_distributed.py` run; each returns its results."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import group
from curvature.networks import OPERATORS, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator, eigsh
from eigenfilter.curvature.engines import NAMES

WORLD = 2
CUT = 27  # the first process has 27 of 40 samples, the second 13


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(31)
    return make("partial")


def vectors() -> Tensor:
    generator = torch.Generator().manual_seed(32)
    return torch.randn(sizes(), 3, generator=generator, dtype=torch.float64)


def sizes() -> int:
    return sum(p.numel() for p in problem()[0].parameters() if p.requires_grad)


def share(rank: int) -> slice:
    return slice(CUT) if rank == 0 else slice(CUT, None)


def operator(
    rank: int, kind: type[CurvatureOperator] = HessianOperator, **options: Any
) -> CurvatureOperator:
    """Return the operator over this process's share, as one batch."""
    model, x, target = problem()
    data = (x[share(rank)], target[share(rank)])
    return kind(model, nn.CrossEntropyLoss(), data, process_group=dist.group.WORLD, **options)


# Scenarios: each is called with the rank, in both processes.


def products(rank: int) -> dict[str, dict[str, Tensor]]:
    return {
        kind.__name__: {
            engine: operator(rank, kind, engine=engine).matmat(vectors())
            for engine in [*NAMES, "auto"]
        }
        for kind in OPERATORS
    }


def loaders(rank: int) -> Tensor:
    """Three batches in one process, two in the other, under DistributedDataParallel."""
    model, x, target = problem()
    data = DataLoader(TensorDataset(x[share(rank)], target[share(rank)]), batch_size=10)
    op = HessianOperator(
        DistributedDataParallel(model),
        nn.CrossEntropyLoss(),
        data,
        process_group=dist.group.WORLD,
        engine="per_pass_graph",
    )
    return op.matmat(vectors())


def sums(rank: int) -> Tensor:
    model, x, target = problem()
    op = HessianOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        (x[share(rank)], target[share(rank)]),
        process_group=dist.group.WORLD,
        reduction="sum",
    )
    return op.matmat(vectors())


def pairs(rank: int) -> tuple[Tensor, int]:
    result = eigsh(operator(rank, engine="cached_graph"), 4, tol=1e-8)
    return result.values, result.matvecs


def other_parameters(rank: int) -> str:
    op = operator(rank)
    if rank:
        with torch.no_grad():
            op.params[0][0, 0] += 1e-6
    return refusal(op, vectors())


def other_vectors(rank: int) -> str:
    return refusal(operator(rank), vectors() * (1 + 1e-6 * rank))


def ignored_targets(rank: int) -> list[str]:
    """In one process alone; by the number of samples, and by that of targets."""
    model, x, target = problem()
    target[3:9] = -100
    result = []
    for weight in (None, lambda batch: (batch[1] != -100).sum()):
        op = HessianOperator(
            model,
            nn.CrossEntropyLoss(),
            (x[share(rank)], target[share(rank)]),
            process_group=dist.group.WORLD,
            weight=weight,
        )
        result.append(refusal(op, vectors()))
    return result


def refusal(op: CurvatureOperator, V: Tensor) -> str:
    try:
        op.matmat(V)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "accepted"


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        products,
        loaders,
        sums,
        pairs,
        other_parameters,
        other_vectors,
        ignored_targets,
    )
}


def main(rank: int, folder: str) -> None:
    """Run every scenario as one of the processes; write its result, or its traceback."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    result: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        try:
            result[name] = scenario(rank)
        except Exception:
            result[name] = traceback.format_exc()
    torch.save(result, Path(folder, f"{rank}.pt"))
    group.leave()
