"""Image data sets as bytes: from scikit-learn, from a folder, or downloaded by torchvision."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eigenfilter.experiments.errors import UserError, require
from eigenfilter.experiments.networks import ImageTask
from eigenfilter.experiments.readers import (
    CorruptFile,
    cifar_archive,
    cifar_binary,
    cifar_pickled,
    idx,
)

ImagesAndLabels = tuple[np.ndarray, np.ndarray]
"""Images [n, c, h, w] and labels [n], both uint8."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A training set and a test set.

    Attributes:
        name: name of the data set.
        images, test_images: uint8 [n, c, h, w].
        labels, test_labels: int64 [n].
        classes: number of classes.
        mean, deviation: float64 [c], the mean and the standard deviation of each channel of the
            training images, scaled to [0, 1].
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: Tensor
    deviation: Tensor

    @property
    def task(self) -> ImageTask:
        """The shape of the images and the number of classes."""
        channels, height, width = self.images.shape[1:]
        return ImageTask((channels, height, width), self.classes)

    @property
    def checksum(self) -> int:
        """CRC-32 of all images and labels."""
        tensors = (self.images, self.labels, self.test_images, self.test_labels)
        value = 0
        for tensor in tensors:
            value = zlib.crc32(tensor.contiguous().numpy().data, value)
        return value

    def first(self, samples: int) -> ImageDataset:
        """Return the data set with the first training images only, or all of them for 0.

        Mean and deviation are computed from these images.

        Raises:
            UserError: the set has fewer images.
        """
        if samples > len(self.images):
            raise UserError(f"{self.name} has {len(self.images)} training images, not {samples}")
        if not samples:
            return self
        return _image_dataset(
            self.name,
            (self.images[:samples], self.labels[:samples]),
            (self.test_images, self.test_labels),
            self.classes,
        )


def folder_of(folder: Path | None) -> Path:
    """Return the data folder: `folder`, else EIGENFILTER_DATA, else ~/.cache/eigenfilter/data."""
    default = Path.home() / ".cache" / "eigenfilter" / "data"
    return folder or Path(os.environ.get("EIGENFILTER_DATA") or default)


def load(name: str, folder: Path | None = None) -> ImageDataset:
    """Read a data set, and download it first if its files are missing.

    Args:
        name: "digits", "mnist", "fashion", "cifar10" or "cifar100".
        folder: folder with the files in torchvision's layout; see `folder_of`. Checksums of
            archives are not compared, so copies that were packed again also work.

    Raises:
        UserError: a package is missing; the files are missing and cannot be downloaded (the
            message says which files belong where); a file is corrupt.
    """
    if name == "digits":
        return _digits()
    files = _FILES[name]
    root = folder_of(folder)
    try:
        parts = files.read(root)
        if parts is None:
            _download(name, files, root)
            parts = files.read(root)
    except CorruptFile as error:
        raise UserError(
            f"{error}; remove it, then start again to download it, or copy it again"
        ) from error
    if parts is None:
        raise UserError(_missing(name, files, root, "the download did not bring them"))
    train, test = parts
    return _image_dataset(
        name, _to_tensors(name, train, files), _to_tensors(name, test, files), files.classes
    )


def _digits() -> ImageDataset:
    """Return scikit-learn's 8x8 digits: 1,437 training and 360 test images in a fixed order."""
    require("sklearn")
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = (values.reshape(-1, 1, 8, 8) * 255 / 16).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1437], order[1437:]
    parts = [
        (torch.from_numpy(images[indices]), torch.from_numpy(labels[indices]))
        for indices in (train, test)
    ]
    return _image_dataset("digits", parts[0], parts[1], 10)


def _image_dataset(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int
) -> ImageDataset:
    counts = torch.stack(
        [torch.bincount(channel.reshape(-1), minlength=256) for channel in train[0].unbind(1)]
    ).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]).square()).sum(1)
    deviation = variance.sqrt()
    deviation[deviation == 0] = 1.0
    return ImageDataset(name, *train, *test, classes, mean, deviation)


# Files on disk.


@dataclass(frozen=True)
class _DatasetFiles:
    """How a data set is stored on disk.

    Attributes:
        read: reads the training and the test part from a folder; None if files are missing.
        where: the expected files, for messages.
        torchvision: name of the torchvision class that downloads the set.
        shape: shape of an image.
        classes: number of classes.
    """

    read: Callable[[Path], tuple[ImagesAndLabels, ImagesAndLabels] | None]
    where: str
    torchvision: str
    shape: tuple[int, int, int]
    classes: int


def _mnist(folder: str) -> _DatasetFiles:
    """Return the files of MNIST or Fashion-MNIST: four files, each plain or compressed by gzip."""

    def read(root: Path) -> tuple[ImagesAndLabels, ImagesAndLabels] | None:
        raw = root / folder / "raw"
        parts = []
        for kind in ("train", "t10k"):
            images = _either(raw / f"{kind}-images-idx3-ubyte")
            labels = _either(raw / f"{kind}-labels-idx1-ubyte")
            if images is None or labels is None:
                return None
            pixels = idx(images, 3, _MAX_IMAGES * 28 * 28)
            parts.append((pixels[:, None], idx(labels, 1, _MAX_IMAGES)))
        return parts[0], parts[1]

    where = f"{folder}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte, or the same with .gz"
    return _DatasetFiles(read, where, folder, (1, 28, 28), 10)


_MAX_IMAGES = 60_000  # in a published file of the MNIST format


def _either(file: Path) -> Path | None:
    """Return the file, or else its copy compressed by gzip, or None."""
    packed = file.with_name(file.name + ".gz")
    return next((path for path in (file, packed) if path.exists()), None)


def _cifar(classes: int, train: tuple[str, ...], test: str) -> _DatasetFiles:
    """Return the files of CIFAR: the Python folder, the binary folder, or the Python archive."""
    name = f"cifar-{classes}"
    pickled = name + ("-batches-py" if classes == 10 else "-python")
    binary = name + ("-batches-bin" if classes == 10 else "-binary")
    archive = f"{name}-python.tar.gz"
    key = "labels" if classes == 10 else "fine_labels"
    max_images = 50_000 // len(train)  # in a published file

    def read(root: Path) -> tuple[ImagesAndLabels, ImagesAndLabels] | None:
        files = (*train, test)
        if _all_exist(root / pickled, files):
            batches = [cifar_pickled(root / pickled / file, key, max_images) for file in files]
        elif _all_exist(root / binary, [f"{file}.bin" for file in files]):
            paths = [root / binary / f"{file}.bin" for file in files]
            batches = [cifar_binary(path, classes, max_images) for path in paths]
        elif (root / archive).exists():
            inside = [f"{pickled}/{file}" for file in files]
            batches = cifar_archive(root / archive, inside, key, max_images)
        else:
            return None
        *parts, last = batches
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return (images, labels), last

    train_files = f"{{{','.join(train)}}}" if len(train) > 1 else train[0]
    where = (
        f"{pickled}/{train_files} and {test}, or the same names with .bin in {binary}, or {archive}"
    )
    return _DatasetFiles(read, where, f"CIFAR{classes}", (3, 32, 32), classes)


def _all_exist(folder: Path, files: tuple[str, ...] | list[str]) -> bool:
    return all((folder / file).exists() for file in files)


_FILES: Mapping[str, _DatasetFiles] = {
    "mnist": _mnist("MNIST"),
    "fashion": _mnist("FashionMNIST"),
    "cifar10": _cifar(10, tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    "cifar100": _cifar(100, ("train",), "test"),
}


def _download(name: str, files: _DatasetFiles, root: Path) -> None:
    require("torchvision")
    import torchvision

    print(f"{name} is not in {root}: downloading", flush=True)
    try:
        getattr(torchvision.datasets, files.torchvision)(root=root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(_missing(name, files, root, f"the download failed ({reason})")) from error


def _missing(name: str, files: _DatasetFiles, root: Path, reason: str) -> str:
    return (
        f"no {name} in {root}, and {reason}; put {files.where} there, or set another folder with "
        "--data-dir or EIGENFILTER_DATA"
    )


def _to_tensors(name: str, part: ImagesAndLabels, files: _DatasetFiles) -> tuple[Tensor, Tensor]:
    """Check the shapes and labels of a part, and return it as tensors."""
    images, labels = part
    if images.shape[1:] != files.shape or len(images) != len(labels) or not len(labels):
        raise UserError(
            f"{name} must have images {list(files.shape)} with one label each, but the files have "
            f"{len(images)} images {list(images.shape[1:])} and {len(labels)} labels; copy the "
            "files of the same data set"
        )
    if labels.max() >= files.classes:
        raise UserError(
            f"{name} has labels up to {files.classes - 1}, but the files have {labels.max()}; "
            "copy the files of the same data set"
        )
    # torch.tensor copies, because arrays over the bytes of a file are not writable.
    return torch.tensor(images), torch.tensor(labels, dtype=torch.int64)
