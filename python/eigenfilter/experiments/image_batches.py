"""Batches of images, which are stored and augmented on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigenfilter.experiments.datasets import ImageDataset
from eigenfilter.experiments.processes import SINGLE_PROCESS, Processes


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images; the defaults disable it.

    Attributes:
        crop: width in pixels of the black border that is padded before a random crop.
        flip: whether each image is flipped horizontally with probability 1/2.
        cutout: side of a square at a random position that is set to the mean color
            (T. DeVries and G. Taylor, 2017, arXiv 1708.04552).
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0


class Normalizer:
    """Converts bytes to numbers of mean 0 and deviation 1 per channel, in a dtype and layout."""

    def __init__(
        self, data: ImageDataset, device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> None:
        scale = 1 / (255 * data.deviation)
        self._scale = scale.to(device, dtype)[:, None, None]
        self._shift = (-data.mean / data.deviation).to(device, dtype)[:, None, None]
        self._dtype = dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalized images [b, c, h, w] of bytes of the same shape."""
        numbers = images.to(self._dtype, memory_format=self._format)
        return numbers.mul_(self._scale).add_(self._shift)


class Batches:
    """The training batches of all epochs.

    A batch is a function of (seed, epoch, index) alone, so training can resume in the middle of an
    epoch without a saved state, and global generators are left alone. The images stay on the
    device as bytes, padded once if there are crops. Each batch is gathered, augmented and
    normalized there, so that the host copies nothing.

    Args:
        data: the images.
        size: images per batch; 0, or a number larger than the set, takes all images at once.
            Images at the end of an epoch's order that do not fill a batch are dropped.
        augmentation: augmentation of every batch.
        normalizer: normalization of every batch, after the augmentation.
        device: device of the images and batches.
        seed: seed of the order and the augmentation.
        processes: processes that share every batch. The augmentation of an image does not depend
            on the process that takes it.

    Attributes:
        size: images per batch over all processes.
        share: images per batch of this process.
        count: batches per epoch.

    Raises:
        ValueError: a batch cannot be divided evenly among the processes.
    """

    def __init__(
        self,
        data: ImageDataset,
        size: int,
        augmentation: Augmentation,
        normalizer: Normalizer,
        device: torch.device,
        seed: int,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        images = data.images.to(device)
        self._height, self._width = images.shape[2:]
        pad = augmentation.crop
        self._windows = torch.nn.functional.pad(images, (pad,) * 4) if pad else images
        self._labels = data.labels.to(device)
        self._augmentation, self._normalizer = augmentation, normalizer
        self._device, self._seed = device, seed
        self._generator = torch.Generator(device)
        self.size = min(size, len(images)) or len(images)
        self.share = processes.samples_per_process(self.size, "batch_size")
        self.count = len(images) // self.size
        self._part = processes.sample_slice
        self._order: tuple[int, Tensor] | None = None  # the last epoch and its order

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return images [share, c, h, w] and labels [share] of a batch, 0 <= index < count."""
        indices = self._epoch_order(epoch)[index * self.size : (index + 1) * self.size][self._part]
        self._seed_generator(epoch, index + 1)
        images = self._flip(self._crop(indices))
        return self._cutout(self._normalizer(images)), self._labels[indices]

    def _epoch_order(self, epoch: int) -> Tensor:
        """Return the order of an epoch; it is fixed for a full batch, so that sums round alike."""
        if self._order is None or self._order[0] != epoch:
            n = len(self._labels)
            if self.size == n:
                order = torch.arange(n, device=self._device)
            else:
                self._seed_generator(epoch, 0)
                order = torch.randperm(n, generator=self._generator, device=self._device)
            self._order = epoch, order
        return self._order[1]

    def _seed_generator(self, epoch: int, index: int) -> None:
        mixed = np.random.SeedSequence((self._seed, epoch, index)).generate_state(1, np.uint64)
        self._generator.manual_seed(int(mixed[0] >> 1))

    def _crop(self, indices: Tensor) -> Tensor:
        pad = self._augmentation.crop
        if not pad:
            return self._windows[indices]
        # `unfold` makes a view of all windows of all images [n, c, 2 pad + 1, 2 pad + 1, h, w],
        # from which one gather takes a window of each chosen image.
        windows = self._windows.unfold(2, self._height, 1).unfold(3, self._width, 1)
        top, left = self._draw(2 * pad + 1), self._draw(2 * pad + 1)
        return windows[indices, :, top, left]

    def _flip(self, images: Tensor) -> Tensor:
        if not self._augmentation.flip:
            return images
        flipped = self._draw(2).bool()[:, None, None, None]
        return torch.where(flipped, images.flip(3), images)

    def _cutout(self, images: Tensor) -> Tensor:
        side = self._augmentation.cutout
        if not side:
            return images
        rows = self._random_interval(self._height, side)[:, :, None]
        columns = self._random_interval(self._width, side)[:, None, :]
        return images.masked_fill_((rows & columns)[:, None], 0.0)

    def _random_interval(self, length: int, side: int) -> Tensor:
        """Return for each image a mask of a random interval of `side` places [share, length]."""
        first = self._draw(length)[:, None] - side // 2
        places = torch.arange(length, device=self._device)
        return (places >= first) & (places < first + side)

    def _draw(self, below: int) -> Tensor:
        """Return a random integer for every image of this process [share].

        Every process draws the numbers of the whole batch and takes its own, so that the result
        does not depend on how many processes there are.
        """
        numbers = torch.randint(below, (self.size,), generator=self._generator, device=self._device)
        return numbers[self._part]


def in_order(
    images: Tensor, labels: Tensor, normalizer: Normalizer, device: torch.device, size: int = 1000
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of all images, normalized, and labels, on the device and in their order."""
    for start in range(0, len(images), size):
        some = slice(start, start + size)
        yield normalizer(images[some].to(device)), labels[some].to(device)
