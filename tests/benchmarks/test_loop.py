"""The training loop's benchmark: equal work on both sides, its table and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.loop import LIBRARY, TORCH, TwoGradients
from eigenfilter.experiments import datasets
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.trainer import Trainer
from experiments import folders


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.cifar(tmp_path, 10, "binary")
    arguments = ["bench", "loop", "--model", "mlp-4", "--batch-size", "4", "--repeat", "3"]
    assert main([*arguments, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "times as long. The goal, at most 1.08, is" in capsys.readouterr().out
    [file] = (tmp_path / "out").glob("*-cpu-loop.json")
    results = json.loads(file.read_text())["loop"]
    assert results["images_per_second"].keys() == {LIBRARY, TORCH}
    assert results["cost"]["low"] <= results["cost"]["median"] <= results["cost"]["high"]
    assert main([*arguments, "--data-dir", str(tmp_path / "none")]) == 2
    assert main([*arguments[:3], "nothing", *arguments[4:], "--data-dir", str(tmp_path)]) == 2


def test_two_gradients_is_gradient_descent() -> None:
    config = Config(dataset="digits", model="mlp-4", optimizer="sgd", samples=64, batch_size=32)
    data = datasets.load("digits")
    twins = [make(config, data, torch.device("cpu")) for make in (Trainer, TwoGradients)]
    for twin in twins:
        twin.advance()
        twin.advance()
    for p, q in zip(*(twin.model.parameters() for twin in twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert twins[0].drain() == pytest.approx(twins[1].drain())
