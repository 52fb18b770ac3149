"""The problems of the study: data in three parts, a network, and the numbers that do not vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenfilter.experiments import datasets
from eigenfilter.experiments.image_batches import Augmentation, Batches, Normalizer, in_order

CPU = torch.device("cpu")

Pairs = Iterator[tuple[Tensor, Tensor]]


class Task(Protocol):
    """What is learned: training batches, and the parts that nothing is trained on."""

    def model(self, seed: int) -> nn.Module:
        """Return the network with its initial weights."""

    def batches(self, seed: int) -> Pairs:
        """Yield training batches without end."""

    def training(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the first training samples, as they are: inputs and targets."""

    def part(self, name: str) -> Pairs:
        """Yield the batches of a part: "training" or "validation" or "test"."""


class Images:
    """Images from the training set of a data set, whose last images are kept for validation.

    `evaluated` of the images that are trained on give the training loss.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        build: Callable[[], nn.Module],
        samples: int,
        evaluated: int,
        validation: int,
        augmentation: Augmentation,
        batch: int,
    ) -> None:
        data = datasets.load(name, folder)
        kept = slice(len(data.images) - validation, None)
        self._parts = {
            "training": (data.images[:evaluated], data.labels[:evaluated]),
            "validation": (data.images[kept], data.labels[kept]),
            "test": (data.test_images, data.test_labels),
        }
        if samples + validation > len(data.images):
            raise ValueError(f"{name} has {len(data.images)} images")
        self._data, self._build, self._batch = data.first(samples), build, batch
        self._augmentation = augmentation
        self._normalizer = Normalizer(self._data, CPU, torch.float32, False)

    def model(self, seed: int) -> nn.Module:
        """Return the network with its initial weights."""
        torch.manual_seed(seed)
        return self._build()

    def batches(self, seed: int) -> Pairs:
        """Yield training batches without end."""
        batches = Batches(self._data, self._batch, self._augmentation, self._normalizer, CPU, seed)
        epoch = 0
        while True:
            yield from (batches.batch(epoch, i) for i in range(batches.count))
            epoch += 1

    def training(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the first training samples, not augmented."""
        return self._normalizer(self._data.images[:samples]), self._data.labels[:samples]

    def part(self, name: str) -> Pairs:
        """Yield the batches of a part."""
        images, labels = self._parts[name]
        yield from in_order(images, labels, self._normalizer, CPU)


def mlp() -> nn.Module:
    """Return 784-64-10 with tanh."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, beside a shortcut."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        stride = 1 if into == out else 2
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1, stride)
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, into, h, w] to [n, out, h / stride, w / stride]."""
        z: Tensor = F.relu(self.body(x) + self.shortcut(x))
        return z


def resnet() -> nn.Module:
    """Return a residual network on 16x16 maps of 16 to 64 channels; 77,000 parameters."""
    stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    blocks = Residual(16, 16), Residual(16, 32), Residual(32, 64)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    """Causal attention and an MLP, both after a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, length, width] to the same shape."""
        n, length, width = x.shape
        heads = self.project(self.norms[0](x)).view(n, length, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5  # written out: its second derivatives exist
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        seen = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        x = x + self.mix(seen.transpose(1, 2).reshape(n, length, width))
        z: Tensor = x + self.mlp(self.norms[1](x))
        return z


class GPT(nn.Module):
    """A GPT over characters; its scores are [n, characters, length], as cross_entropy has them."""

    def __init__(self, characters: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.08)

    def forward(self, ids: Tensor) -> Tensor:
        """Map characters [n, length] to scores of the ones that follow."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores.mT


class Text:
    """The text of Python's own `help()`: its first 80% to train on, then 10% and 10%."""

    def __init__(self, folder: Path, batch: int, length: int, width: int, depth: int) -> None:
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics))
        characters = sorted(set(text))
        number = {character: i for i, character in enumerate(characters)}
        ids = torch.tensor([number[character] for character in text])
        ends = [0, int(0.8 * len(ids)), int(0.9 * len(ids)), len(ids)]
        names = ("training", "validation", "test")
        self._parts = {n: ids[ends[i] : ends[i + 1]] for i, n in enumerate(names)}
        self._build = partial(GPT, len(characters), length, width, depth)
        self._batch, self._length = batch, length

    def model(self, seed: int) -> nn.Module:
        """Return the network with its initial weights."""
        torch.manual_seed(seed)
        return self._build()

    def batches(self, seed: int) -> Pairs:
        """Yield training batches without end: stretches that begin anywhere."""
        generator = torch.Generator().manual_seed(seed)
        ids = self._parts["training"]
        while True:
            first = torch.randint(len(ids) - self._length, (self._batch, 1), generator=generator)
            at = first + torch.arange(self._length + 1)
            yield ids[at[:, :-1]], ids[at[:, 1:]]

    def training(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return stretches that are spread over the training text."""
        return self._stretches("training", samples)

    def part(self, name: str) -> Pairs:
        """Yield batches of stretches that are spread over a part: all of it, or 1,024."""
        inputs, targets = self._stretches(name, 1024)
        yield from zip(torch.split(inputs, 128), torch.split(targets, 128), strict=True)

    def _stretches(self, name: str, most: int) -> tuple[Tensor, Tensor]:
        ids = self._parts[name]
        whole = (len(ids) - 1) // self._length
        chosen = torch.arange(min(most, whole)) * (whole / min(most, whole))
        at = chosen.long()[:, None] * self._length + torch.arange(self._length + 1)
        return ids[at[:, :-1]], ids[at[:, 1:]]


@dataclass(frozen=True)
class Problem:
    """A problem with the numbers that all methods share.

    Attributes:
        title: its name in figures and tables.
        load: reads the data from a folder.
        lrs: the learning rates of heavy ball that are tried.
        steps: number of training steps.
        cosine: whether lr decays to 0 along a cosine, after a linear warmup over a twentieth of
            the steps; else it is constant.
        ahead: three distances e of extrapolated momentum.
        back: distance of look-back, behind x.
        rho: radius of USAM.
        sam_rho, msam_rho: radii of SAM and MSAM.
        probe: number of training samples on which the sharpness is measured.
        batches: number of batches of a part that are evaluated; None takes all.
        seeds, tuning_seeds: numbers of seeds of the runs, and of the runs that choose lr.
    """

    title: str
    load: Callable[[Path], Task]
    lrs: tuple[float, ...]
    steps: int
    cosine: bool
    ahead: tuple[float, float, float]
    back: float
    rho: float
    sam_rho: float
    msam_rho: float
    probe: int
    seeds: int
    tuning_seeds: int
    batches: int | None = None

    def short(self) -> Problem:
        """Return a problem of the same kind that takes seconds, to try the code."""
        return replace(
            self, steps=20, lrs=self.lrs[:2], seeds=1, tuning_seeds=1, probe=8, batches=1
        )


def loss_fn(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, over classes or characters."""
    return F.cross_entropy(scores, targets)


PROBLEMS = {
    "fashion": Problem(
        "Fashion-MNIST, MLP",
        partial(
            Images,
            name="fashion",
            build=mlp,
            samples=50_000,
            evaluated=50_000,
            validation=10_000,
            augmentation=Augmentation(),
            batch=128,
        ),
        lrs=(0.0025, 0.005, 0.01, 0.02, 0.04),
        steps=3900,
        cosine=False,
        ahead=(0.25, 0.5, 1.0),
        back=0.03,
        rho=0.1,
        sam_rho=0.1,
        msam_rho=0.8,
        probe=1024,
        seeds=6,
        tuning_seeds=1,
    ),
    "cifar10": Problem(
        "CIFAR-10, residual network",
        partial(
            Images,
            name="cifar10",
            build=resnet,
            samples=20_000,
            evaluated=5_000,
            validation=5_000,
            augmentation=Augmentation(crop=4, flip=True),
            batch=128,
        ),
        lrs=(0.05, 0.1, 0.2, 0.4),
        steps=600,
        cosine=True,
        ahead=(0.1, 0.25, 0.5),
        back=0.015,
        rho=0.1,
        sam_rho=0.1,
        msam_rho=0.4,
        probe=256,
        seeds=3,
        tuning_seeds=1,
    ),
    "gpt": Problem(
        "Python's help, GPT over characters",
        partial(Text, batch=16, length=64, width=64, depth=2),
        lrs=(0.1, 0.2, 0.4, 0.8),
        steps=800,
        cosine=True,
        ahead=(0.1, 0.25, 0.5),
        back=0.02,
        rho=0.1,
        sam_rho=0.05,
        msam_rho=0.15,
        probe=32,
        seeds=3,
        tuning_seeds=1,
    ),
}
