"""A run of two processes is that of one: the essential part of test_processes.py."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from eigenfilter.experiments import datasets, processes, runs
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.trainer import Trainer
from experiments.test_processes import ALIKE, assert_close
from experiments.test_train import lines
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed


def train(rank: int, name: str, folder: str) -> int:
    with mock.patch.dict(os.environ, LOCAL_RANK=str(rank)):
        group = processes._TorchrunProcesses()
    result = runs.run(Config(**ALIKE[name]), Path(folder), processes=group)
    steps: int = result["step"]
    return steps


def test_equal_to_a_single_process(run_distributed: RunDistributed, tmp_path: Path) -> None:
    first, second = run_distributed(train, 2, "usam", str(tmp_path / "two"))
    alone = runs.run(Config(**ALIKE["usam"]), tmp_path / "one")
    assert first == second == alone["step"]
    assert_close(tmp_path / "two", tmp_path / "one")
    assert {record["kind"] for record in lines(tmp_path / "two")} == {"train", "test", "sharpness"}


LOCAL = ALIKE["usam"] | {"ascent_part": 1.0, "ascent_sync": False}


def take_steps(rank: int, count: int) -> list[torch.Tensor]:
    with mock.patch.dict(os.environ, LOCAL_RANK=str(rank)):
        group = processes._TorchrunProcesses()
    trainer = Trainer(Config(**LOCAL), datasets.load("digits"), torch.device("cpu"), group)
    for _ in range(count):
        trainer.advance()
    return [p.detach() for p in trainer.model.parameters()]


def test_ascents_of_each_process(run_distributed: RunDistributed) -> None:
    """Equal to two trainers in one process, each on its half of a batch, with the mean gradient."""
    first, second = run_distributed(take_steps, 2, 3)
    assert all(map(torch.equal, first, second))
    config, data = Config(**LOCAL), datasets.load("digits")
    trainers = [Trainer(config, data, torch.device("cpu")) for _ in range(2)]
    for step in range(3):
        for rank, trainer in enumerate(trainers):
            epoch, index = divmod(step, trainer.steps_per_epoch)
            images, labels = (t[rank::2] for t in trainer._batches.batch(epoch, index))
            for _ in range(2):
                trainer._evaluate(images, labels)
                trainer.optimizer.ascend()
        pairs = zip(*(trainer.model.parameters() for trainer in trainers), strict=True)
        for p, q in pairs:
            mean = (p.grad + q.grad) / 2
            p.grad.copy_(mean)
            q.grad.copy_(mean)
        for trainer in trainers:
            trainer.optimizer.clip_grad_norm_(config.clip)
            trainer.optimizer.step()
            trainer._lr.step()
            trainer._rho.step()
    expected = [p.detach() for p in trainers[0].model.parameters()]
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-10)
