"""Data sets, standardised and ready to train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Inputs [n, features] and labels [n], of the training set and of held-out data."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    @property
    def targets(self) -> Tensor:
        """The training labels as unit vectors [n, 10], for the square loss."""
        return torch.nn.functional.one_hot(self.labels, CLASSES).to(self.inputs.dtype)


def digits(samples: int = 400) -> Split:
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
    return Split(*(torch.from_numpy(array) for array in arrays))
