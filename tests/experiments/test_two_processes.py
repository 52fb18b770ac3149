"""A run of two processes is that of one: the essential part of test_processes.py."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from eigenfilter.experiments import processes, runs
from eigenfilter.experiments.config import Config
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
