"""Batches: each image once per epoch, correct augmentations, and reproducible order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from eigenfilter.experiments.datasets import ImageDataset, _image_dataset
from eigenfilter.experiments.image_batches import Augmentation, Batches, Normalizer, in_order
from experiments import folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    """Return images whose pixels differ from each other and from 0."""
    pixels = (1 + np.arange(40 * 3 * 6 * 6) % 251).reshape(40, 3, 6, 6).astype(np.uint8)
    labels = torch.arange(40)
    return _image_dataset("made", (torch.from_numpy(pixels), labels), (torch.empty(0), labels), 40)


def batches(data: ImageDataset, size: int = 7, seed: int = 3, **augmentation: int) -> Batches:
    normalizer = Normalizer(data, CPU, torch.float64, channels_last=False)
    return Batches(data, size, Augmentation(**augmentation), normalizer, CPU, seed)


def as_bytes(data: ImageDataset, images: Tensor) -> Tensor:
    """Return the bytes of normalized images."""
    raw = 255 * (images * data.deviation[:, None, None] + data.mean[:, None, None])
    return raw.round().to(torch.uint8)


def test_an_epoch_has_every_image_once(data: ImageDataset) -> None:
    source = batches(data, size=8)
    assert source.count == 5
    orders = []
    for epoch in (0, 1):
        drawn = [source.batch(epoch, i) for i in range(5)]
        labels = torch.cat([labels for _, labels in drawn])
        assert torch.equal(labels.sort().values, torch.arange(40))
        images = as_bytes(data, torch.cat([images for images, _ in drawn]))
        assert torch.equal(images, data.images[labels])
        orders.append(labels)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], torch.arange(40))


def test_what_fills_no_batch_is_left_out(data: ImageDataset) -> None:
    source = batches(data, size=7)
    assert source.count == 5
    assert all(len(source.batch(0, i)[1]) == 7 for i in range(5))


@pytest.mark.parametrize("size", [0, 40, 100])
def test_a_full_batch_keeps_its_order(data: ImageDataset, size: int) -> None:
    source = batches(data, size=size)
    assert (source.size, source.count) == (40, 1)
    assert torch.equal(source.batch(5, 0)[1], torch.arange(40))


def test_a_batch_depends_on_seed_epoch_and_index_alone(data: ImageDataset) -> None:
    everything = {"crop": 2, "flip": True, "cutout": 3}
    state = torch.get_rng_state()
    first = batches(data, **everything)
    straight = [first.batch(e, i) for e in (0, 1) for i in range(5)]
    again = batches(data, **everything).batch(1, 2)
    assert torch.equal(again[0], straight[7][0])
    assert torch.equal(again[1], straight[7][1])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(batches(data, seed=4, **everything).batch(1, 2)[0], again[0])


def test_crops_are_windows_of_the_padded_image(data: ImageDataset) -> None:
    images, labels = batches(data, size=40, crop=2).batch(0, 0)
    padded = torch.nn.functional.pad(data.images, (2, 2, 2, 2))
    places = set()
    for image, label in zip(as_bytes(data, images), labels, strict=True):
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(padded[label, :, y : y + 6, x : x + 6], image)
        ]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) > 12  # of 25, with 40 images


def test_flips_are_of_half_the_images(data: ImageDataset) -> None:
    flipped = 0
    source = batches(data, size=40, flip=True)
    for epoch in range(10):
        images, labels = source.batch(epoch, 0)
        for image, label in zip(as_bytes(data, images), labels, strict=True):
            turned = torch.equal(image, data.images[label].flip(2))
            assert turned or torch.equal(image, data.images[label])
            flipped += turned
    assert 150 < flipped < 250


def test_cutout_sets_a_square_to_the_mean(data: ImageDataset) -> None:
    plain, _ = batches(data, size=40).batch(0, 0)
    images, _ = batches(data, size=40, cutout=3).batch(0, 0)
    whole = 0
    for image, before in zip(images, plain, strict=True):
        mask = image != before
        assert torch.all(image[mask] == 0)
        assert torch.equal(mask[0], mask[1])
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        assert mask[0].sum() == len(rows) * len(columns)  # a rectangle, which the border may cut
        assert int(rows[-1] - rows[0] + 1) == len(rows) in (2, 3)
        assert int(columns[-1] - columns[0] + 1) == len(columns) in (2, 3)
        whole += len(rows) == len(columns) == 3
    assert whole > 10


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalized_images(data: ImageDataset, dtype: torch.dtype, channels_last: bool) -> None:
    normalizer = Normalizer(data, CPU, dtype, channels_last)
    images = normalizer(data.images)
    assert images.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert images.is_contiguous(memory_format=layout)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert int(data.images.min()) == 1  # the bytes are as they were


def test_in_order(data: ImageDataset) -> None:
    normalizer = Normalizer(data, CPU, torch.float32, channels_last=False)
    parts = list(in_order(data.images, data.labels, normalizer, CPU, size=15))
    assert [len(labels) for _, labels in parts] == [15, 15, 10]
    assert torch.equal(torch.cat([images for images, _ in parts]), normalizer(data.images))


def test_a_constant_channel_is_zero() -> None:
    pixels, labels = folders.images(10, (3, 6, 6), 10, seed=0)
    pixels[:, 1] = 7
    part = (torch.from_numpy(pixels), torch.from_numpy(labels).long())
    data = _image_dataset("made", part, part, 10)
    images = Normalizer(data, CPU, torch.float64, channels_last=False)(data.images)
    assert images[:, 1].abs().max() < 1e-12
