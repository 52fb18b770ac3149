"""The messages of eigenfilter train when a loss or the sharpness is no longer finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eigenfilter.experiments import datasets, runs
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.trainer import Diverged, Trainer
from experiments.test_train import SMALL


def loss_of_a_step(trainer: Trainer) -> float:
    trainer.advance()
    [loss] = trainer._losses
    trainer._losses = []
    return float(loss)


@pytest.mark.parametrize("log_every", [1, 7, 50])
def test_a_loss_that_is_not_finite_names_the_step(log_every: int, tmp_path: Path) -> None:
    config = Config(
        **SMALL
        | {"lr": 1e18, "optimizer": "sgd", "lr_schedule": "constant"}
        | {"log_every": log_every, "warmup": 2.0, "epochs": 10}
    )
    with pytest.raises(Diverged) as error:
        runs.run(config, tmp_path)
    reference = Trainer(config, datasets.load("digits"), torch.device("cpu"))
    while math.isfinite(loss_of_a_step(reference)):
        pass
    assert error.value.step == reference.step
    assert f"the loss of step {reference.step} is " in str(error.value)
    assert "lower lr (" in str(error.value)


@pytest.mark.parametrize(
    ("every", "says"),
    [(1, "the Hessian after step 1 is not finite"), (2, "the loss of step 2 is nan")],
)
def test_a_sharpness_that_cannot_be_measured_is_divergence(
    every: int, says: str, tmp_path: Path
) -> None:
    """The measurement may fail before the loss is infinite, or before the log reads the loss."""
    watched = {"sharpness_every": every, "sharpness_samples": 20, "model": "mlp-12-9"}
    config = Config(**SMALL | {"lr": 1e18, "optimizer": "sgd"} | watched)
    with pytest.raises(Diverged, match=f"{says}.*lower lr"):
        runs.run(config, tmp_path)
