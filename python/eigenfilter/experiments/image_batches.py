"""Batches of images that are held and augmented on the device."""

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
    """Random changes of training images; all at 0 change nothing.

    Attributes:
        crop: pixels of black around an image, from which a window of its size is cut.
        flip: reflect every other image, on average, left to right.
        cutout: side of a square that is set to the mean colour, its centre anywhere in the image
            (T. DeVries and G. Taylor, 2017, arXiv 1708.04552).
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0


class Normalizer:
    """Bytes to numbers of mean 0 and deviation 1 a channel, in one dtype and memory layout."""

    def __init__(
        self, data: ImageDataset, device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> None:
        scale = 1 / (255 * data.deviation)
        self._scale = scale.to(device, dtype)[:, None, None]
        self._shift = (-data.mean / data.deviation).to(device, dtype)[:, None, None]
        self._dtype = dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Images [b, c, h, w] from bytes of the same shape."""
        numbers = images.to(self._dtype, memory_format=self._format)
        return numbers.mul_(self._scale).add_(self._shift)


class Batches:
    """The training batches of any epoch.

    A batch is a function of (seed, epoch, index) alone: to go on in the middle of an epoch needs no
    saved state, and no generator but the one here is touched. The images lie on the device as
    bytes, padded once where crops are wanted, and a batch is gathered, augmented and normalised
    there, so that the host copies nothing.

    Args:
        data: the images.
        size: of a batch; 0, or more than there are, for all images in one. The images of an epoch
            that fill no batch are left out of it; others in every epoch, by the order.
        augmentation: of every batch.
        normaliser: of every batch, after it.
        device: where everything happens.
        seed: of the order and the augmentation.
        processes: that share every batch; images are augmented alike whoever has them.

    Attributes:
        size: of a batch, of all processes together.
        share: what this process has of it.
        count: batches an epoch.

    Raises:
        ValueError: a batch cannot be shared evenly.
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
        self._order: tuple[int, Tensor] | None = None  # of the epoch last asked for

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Images [share, c, h, w] and labels [share] of a batch, 0 <= index < count."""
        chosen = self._epoch_order(epoch)[index * self.size : (index + 1) * self.size][self._part]
        self._seed_generator(epoch, index + 1)
        images = self._flip(self._crop(chosen))
        return self._cutout(self._normalizer(images)), self._labels[chosen]

    def _epoch_order(self, epoch: int) -> Tensor:
        """The order of an epoch: for a full batch always the same, so that sums round alike."""
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

    def _crop(self, chosen: Tensor) -> Tensor:
        pad = self._augmentation.crop
        if not pad:
            return self._windows[chosen]
        # A view of all windows of all images [n, c, 2 pad + 1, 2 pad + 1, h, w]: one gather.
        every = self._windows.unfold(2, self._height, 1).unfold(3, self._width, 1)
        top, left = self._draw(2 * pad + 1), self._draw(2 * pad + 1)
        return every[chosen, :, top, left]

    def _flip(self, images: Tensor) -> Tensor:
        if not self._augmentation.flip:
            return images
        turned = self._draw(2).bool()[:, None, None, None]
        return torch.where(turned, images.flip(3), images)

    def _cutout(self, images: Tensor) -> Tensor:
        side = self._augmentation.cutout
        if not side:
            return images
        rows = self._inside(self._height, side)[:, :, None]
        columns = self._inside(self._width, side)[:, None, :]
        return images.masked_fill_((rows & columns)[:, None], 0.0)

    def _inside(self, length: int, side: int) -> Tensor:
        """Which of `length` places an interval covers [share, length], image by image."""
        first = self._draw(length)[:, None] - side // 2
        places = torch.arange(length, device=self._device)
        return (places >= first) & (places < first + side)

    def _draw(self, below: int) -> Tensor:
        """A whole number for every image of this process [share], drawn for those of all."""
        drawn = torch.randint(below, (self.size,), generator=self._generator, device=self._device)
        return drawn[self._part]


def in_order(
    images: Tensor, labels: Tensor, normalizer: Normalizer, device: torch.device, size: int = 1000
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images and labels, normalised, on the device, in their order."""
    for start in range(0, len(images), size):
        some = slice(start, start + size)
        yield normalizer(images[some].to(device)), labels[some].to(device)
