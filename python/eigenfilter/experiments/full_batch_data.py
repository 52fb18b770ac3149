"""Small data sets for full-batch training, centered or standardized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eigenfilter.experiments import datasets
from eigenfilter.experiments.errors import UserError


@dataclass(frozen=True)
class TrainTestSplit:
    """Inputs [n, features] and labels [n] of a training set and a test set."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def digits(samples: int = 400) -> TrainTestSplit:
    """Return scikit-learn's 8x8 digits in float64: a fixed training subset, the rest for testing.

    Each of the 64 features is standardized to mean 0 and variance 1 over the training subset. A
    feature that is constant there becomes 0.

    Args:
        samples: size of the training subset, from 1 to 1796.
    """
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))
    train, test = order[:samples], order[samples:]
    deviation = inputs[train].std(axis=0)
    deviation[deviation == 0.0] = 1.0
    inputs = (inputs - inputs[train].mean(axis=0)) / deviation
    arrays = (inputs[train], labels[train], inputs[test], labels[test])
    return TrainTestSplit(*(torch.from_numpy(array) for array in arrays))


def fashion(samples: int = 5000, folder: Path | None = None) -> TrainTestSplit:
    """Return the first training images of Fashion-MNIST and its test set, in float32.

    Pixels are scaled to [0, 1], and the mean of each pixel over the training images is subtracted.

    Args:
        samples: number of training images, from 1 to 60,000.
        folder: data folder in torchvision's layout; see `datasets.folder_of`.

    Raises:
        UserError: the data are missing or corrupt, or there are fewer images.
    """
    data = datasets.load("fashion", folder)
    if len(data.images) < samples:
        raise UserError(f"fashion has {len(data.images)} training images, not {samples}")
    images, labels = data.images[:samples], data.labels[:samples]
    inputs, test_inputs = (x.flatten(1).float() / 255 for x in (images, data.test_images))
    mean = inputs.mean(dim=0)
    return TrainTestSplit(inputs - mean, labels, test_inputs - mean, data.test_labels)
