"""Small sets to train on in full batches, standardised."""

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
    """Inputs [n, features] and labels [n], of the training set and of held-out data."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def digits(samples: int = 400) -> TrainTestSplit:
    """Scikit-learn's 8x8 digits in float64: a fixed subset to train on, the others held out.

    Each of the 64 features has mean 0 and variance 1 over the subset; a constant one becomes 0
    there.

    Args:
        samples: size of the subset, 1 to 1796.
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
    """The first images of Fashion-MNIST in float32, to train on, and its test set.

    Pixels lie in [0, 1]; the mean of each over the training images is taken off.

    Args:
        samples: how many to train on, 1 to 60,000.
        folder: of the data, in torchvision's layout; see `datasets.folder_of`.

    Raises:
        UserError: the data are not there, corrupt, or fewer.
    """
    found = datasets.load("fashion", folder)
    if len(found.images) < samples:
        raise UserError(f"fashion has {len(found.images)} training images, not {samples}")
    images, labels = found.images[:samples], found.labels[:samples]
    inputs, test_inputs = (x.flatten(1).float() / 255 for x in (images, found.test_images))
    mean = inputs.mean(dim=0)
    return TrainTestSplit(inputs - mean, labels, test_inputs - mean, found.test_labels)
