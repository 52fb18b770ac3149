"""DistributedDataParallel in two processes is the single process's run, and both skip together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from optimizers.distributed_problem import (
    OPTIMIZERS,
    SETTINGS,
    STEPS,
    evaluation,
    full,
    network,
    share,
    step_with_released_gradients,
    train,
    train_alone,
)
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed


def train_replicas(rank: int, name: str) -> list[Tensor]:
    model = DistributedDataParallel(network())
    return train(OPTIMIZERS[name](model.parameters()), model, share(rank))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_single_processs_run(run_distributed: RunDistributed, name: str) -> None:
    first, second = run_distributed(train_replicas, 2, name)
    rounding = 1e-7 if name == "difference" else 1e-12
    expected = train_alone(OPTIMIZERS[name])
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


def ascend_locally(rank: int) -> list[Tensor]:
    """Each process ascends along its own gradient; the descent is shared, so all stay equal."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    for _ in range(STEPS):
        with model.no_sync():
            closure()
        opt.ascend()
        closure()
        opt.step()
    return full(model.parameters())


def test_ascents_without_synchronization_keep_processes_together(
    run_distributed: RunDistributed,
) -> None:
    first, second = run_distributed(ascend_locally, 2)
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, train_alone()))


def release_gradients(rank: int) -> str:
    return step_with_released_gradients(DistributedDataParallel(network()), rank)


def test_released_gradients_are_refused_before_they_are_reduced(
    run_distributed: RunDistributed,
) -> None:
    for message in run_distributed(release_gradients, 2):
        assert "leave it False in a distributed job" in message


def skip_a_local_ascent(rank: int) -> dict[str, Any]:
    """One process's ascent, which is not synchronized, is not finite: all skip."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS, skip_nonfinite=True)
    closure = evaluation(opt, model, share(rank))
    before = full(model.parameters())
    with model.no_sync():
        closure()
    if rank == 1:
        next(model.parameters()).grad[2, 3] = torch.nan
    opt.ascend()
    perturbed = not all(map(torch.equal, full(model.parameters()), before))
    closure()
    opt.step()
    return {"perturbed": perturbed, "skipped": opt.skipped, "params": full(model.parameters())}


def test_all_skip_together(run_distributed: RunDistributed) -> None:
    start = [p.detach() for p in network().parameters()]
    for result in run_distributed(skip_a_local_ascent, 2):
        assert not result["perturbed"]
        assert result["skipped"] == 1
        assert all(map(torch.equal, result["params"], start))
