"""The Hessians whose eigenpairs are sought: networks after a short training on real data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.curvature import datasets
from benchmarks.curvature.datasets import Batch
from benchmarks.networks import GPT, resnet18


@dataclass(frozen=True)
class Problem:
    """The mean of a loss over some data; `data` is one batch, or a loader of several."""

    model: nn.Module
    loss_fn: nn.Module
    data: Any

    @property
    def params(self) -> list[nn.Parameter]:
        """Those of the model."""
        return list(self.model.parameters())

    @property
    def batches(self) -> list[Batch]:
        """The data in memory."""
        return [self.data] if isinstance(self.data, tuple) else [(x, y) for x, y in self.data]

    def double(self) -> Problem:
        """The same in float64."""
        batches = [(x.double() if x.is_floating_point() else x, y) for x, y in self.batches]
        return Problem(copy.deepcopy(self.model).double(), self.loss_fn, batches)

    def gradients(self) -> list[tuple[Tensor, ...]]:
        """First derivatives of each batch's share, with their graphs."""
        samples = sum(len(x) for x, _ in self.batches)
        return [
            torch.autograd.grad(
                self.loss_fn(self.model(x), y) * (len(x) / samples), self.params, create_graph=True
            )
            for x, y in self.batches
        ]


def product(problem: Problem, gradients: Sequence[Sequence[Tensor]], keep: bool) -> list[Tensor]:
    """Return H 1 in pieces, from first derivatives whose graphs are kept or freed."""
    ones = [torch.ones_like(p) for p in problem.params]
    total = [torch.zeros_like(p) for p in problem.params]
    for grads in gradients:
        for t, h in zip(
            total,
            torch.autograd.grad(grads, problem.params, ones, retain_graph=keep),
            strict=True,
        ):
            t += h
    return total


class Unfused(nn.Module):
    """A network whose attention can be differentiated twice."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """As the network."""
        with sdpa_kernel(SDPBackend.MATH):
            y: Tensor = self.network(x)
        return y


@dataclass(frozen=True)
class Recipe:
    """How a problem comes about.

    Attributes:
        summary: what it is.
        make: the network.
        read: the data, of so many samples, from a folder.
        samples: how many.
        steps: of training, all data at once.
        lr: of those steps, with heavy ball.
        batch: the size of a loader's batches; None for one batch.
        vectors: whether only those contenders take part whose vectors' cost is the question.
        large: whether every contender solves it once only, within a limit of time.
    """

    summary: str
    make: Callable[[], nn.Module]
    read: Callable[[int, Path], Batch]
    samples: int
    steps: int = 60
    lr: float = 0.05
    batch: int | None = None
    vectors: bool = False
    large: bool = False

    @property
    def kind(self) -> str:
        """Whose goals hold: "vectors", "loader" or "batch"."""
        if self.vectors:
            return "vectors"
        return "batch" if self.batch is None else "loader"

    def build(self, folder: Path) -> Problem:
        """Train the network, equally every time, and leave it in evaluation mode.

        Raises:
            Missing: the data are not in the folder.
        """
        inputs, labels = self.read(self.samples, folder)
        loss_fn = nn.CrossEntropyLoss()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
        opt = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
        for _ in range(self.steps):
            step(opt, Problem(model, loss_fn, (inputs, labels)))
        opt.zero_grad()
        model.eval()  # as PyHessian has it, whatever it is given
        if self.batch is None:
            return Problem(model, loss_fn, (inputs, labels))
        loader = DataLoader(TensorDataset(inputs, labels), batch_size=self.batch)
        return Problem(model, loss_fn, loader)


def step(opt: torch.optim.Optimizer, problem: Problem) -> None:
    """Train on the first batch."""
    x, y = problem.batches[0]
    opt.zero_grad()
    torch.autograd.backward(problem.loss_fn(problem.model(x), y))
    opt.step()


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _conv() -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, 2, 1), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def _gpt() -> nn.Module:
    return Unfused(GPT(width=64, layers=2))


RECIPES: Mapping[str, Recipe] = {
    "mlp-digits": Recipe(
        "MLP 64-64-10, 400 digits", lambda: _mlp(64, 64, 10), datasets.digits, 400
    ),
    "mlp-mnist": Recipe(
        "MLP 784-128-64-10, 512 images of MNIST",
        lambda: _mlp(784, 128, 64, 10),
        datasets.mnist,
        512,
    ),
    "mlp-fashion": Recipe(
        "MLP 784-128-64-10, 512 images of Fashion-MNIST",
        lambda: _mlp(784, 128, 64, 10),
        datasets.fashion,
        512,
    ),
    "conv-cifar10": Recipe(
        "three convolutions, 128 images of CIFAR-10", _conv, datasets.cifar10, 128, lr=0.02
    ),
    "gpt-text": Recipe("2-layer GPT, 4 x 64 characters of English", _gpt, datasets.text, 4, lr=0.1),
    "mlp-mnist-loader": Recipe(
        "MLP 784-128-64-10, a loader of 4 x 128 images of MNIST",
        lambda: _mlp(784, 128, 64, 10),
        datasets.mnist,
        512,
        batch=128,
    ),
    "wide-cifar10": Recipe(
        "MLP 3072-4096-2816-10, 32 images of CIFAR-10",
        lambda: _mlp(3072, 4096, 2816, 10),
        datasets.cifar10,
        32,
        steps=5,
        vectors=True,
        large=True,
    ),
    "resnet-cifar10": Recipe(
        "ResNet-18 of 24M parameters, 8 images of CIFAR-10",
        resnet18,
        datasets.cifar10,
        8,
        steps=20,
        lr=0.02,
        large=True,
    ),
}
