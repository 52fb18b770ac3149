"""Problems of the full-batch experiments: a data set, an activation and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eigenfilter.experiments import networks
from eigenfilter.experiments.full_batch_data import TrainTestSplit, digits, fashion
from eigenfilter.experiments.losses import LOSSES

DATASETS = ("digits", "fashion")
ACTIVATIONS = ("tanh", "relu")
WIDTH = 40
SCALE = 0.8  # factor of torch's initial weights, so that training starts at a lower sharpness
CLASSES = 10


@dataclass(frozen=True, eq=False)
class FullBatchProblem:
    """A fully connected network with one hidden layer of 40 units, its data and its loss.

    Attributes:
        data: training and test set.
        activation: "tanh" or "relu".
        loss_name: "square" or "cross_entropy".
    """

    data: TrainTestSplit
    activation: str = "tanh"
    loss_name: str = "square"

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of scores [n, 10] and labels [n]."""
        return LOSSES[self.loss_name]

    def network(self, seed: int) -> nn.Module:
        """Build the network in the dtype of the data, without changing torch's global generator."""
        inputs = self.data.inputs
        task = networks.ImageTask((1, 1, inputs.shape[1]), CLASSES)
        network = networks.build(
            f"mlp-{WIDTH}", task, activation=self.activation, dropout=0.0, seed=seed
        ).to(inputs.dtype)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(SCALE)
        return network


def load(dataset: str, activation: str, loss: str, folder: Path | None = None) -> FullBatchProblem:
    """Return the problem on 400 digits in float64, or on 5,000 Fashion-MNIST images in float32.

    Args:
        dataset: one of `DATASETS`.
        activation: one of `ACTIVATIONS`.
        loss: one of `LOSSES`.
        folder: folder of Fashion-MNIST; see `datasets.folder_of`.

    Raises:
        UserError: the data are missing or corrupt.
    """
    data = digits() if dataset == "digits" else fashion(folder=folder)
    return FullBatchProblem(data, activation, loss)
