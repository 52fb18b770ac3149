"""Real data, read from unpacked files in their authors' formats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.networks import LENGTH
from eigenfilter.experiments import full_batch_data

FOLDER = Path(os.environ.get("EIGENFILTER_DATA", Path.home() / ".cache" / "eigenfilter" / "data"))
CIFAR_BYTES = 3072  # bytes of an image; one byte with its label comes before them

Batch = tuple[Tensor, Tensor]


class MissingRequirement(Exception):
    """Data or a package is missing; the message says which, in one line."""


def digits(samples: int, folder: Path) -> Batch:
    """Scikit-learn's digits [n, 64], which need no file."""
    split = full_batch_data.digits(samples)
    return split.inputs.float(), split.labels


def mnist(samples: int, folder: Path) -> Batch:
    """The first training images of MNIST [n, 784]."""
    return _idx(folder / "MNIST" / "raw", samples)


def fashion(samples: int, folder: Path) -> Batch:
    """The first training images of Fashion-MNIST [n, 784]."""
    return _idx(folder / "FashionMNIST" / "raw", samples)


def _idx(raw: Path, samples: int) -> Batch:
    images = _bytes(raw / "train-images-idx3-ubyte", 16, 784 * samples).reshape(samples, 784)
    labels = _bytes(raw / "train-labels-idx1-ubyte", 8, samples)
    return _standardized(images), torch.from_numpy(labels.astype(np.int64))


def cifar10(samples: int, folder: Path) -> Batch:
    """The first training images of CIFAR_BYTES-10 [n, 3, 32, 32]."""
    file = folder / "cifar-10-batches-bin" / "data_batch_1.bin"
    records = _bytes(file, 0, (CIFAR_BYTES + 1) * samples).reshape(samples, CIFAR_BYTES + 1)
    images = _standardized(records[:, 1:]).view(samples, 3, 32, 32)
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


def text(samples: int, folder: Path) -> Batch:
    """Characters [n, LENGTH] of Python's manual, and the next character of each; needs no file."""
    from pydoc_data.topics import topics

    characters = "".join(topics.values())[: samples * (LENGTH + 1)].encode("ascii", "replace")
    tokens = torch.tensor(list(characters)).view(samples, LENGTH + 1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _bytes(file: Path, start: int, count: int) -> np.ndarray:
    if not file.exists():
        raise MissingRequirement(
            f"{file.name} is not in {file.parent}: set EIGENFILTER_DATA or --data-dir"
        )
    return np.fromfile(file, np.uint8, count, offset=start)


def _standardized(images: np.ndarray) -> Tensor:
    x = torch.from_numpy(images.astype(np.float32))
    return (x - x.mean()) / x.std()
