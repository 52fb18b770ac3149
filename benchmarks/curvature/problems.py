"""Problems: the Hessians of networks after a short training on real data."""

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

from benchmarks.curvature import problem_data
from benchmarks.curvature.problem_data import Batch
from benchmarks.networks import GPT, resnet18


@dataclass(frozen=True)
class HessianProblem:
    """The Hessian of a model's mean loss over some data: one batch, or a loader of several."""

    model: nn.Module
    loss_fn: nn.Module
    data: Any

    @property
    def params(self) -> list[nn.Parameter]:
        """The model's parameters."""
        return list(self.model.parameters())

    @property
    def batches(self) -> list[Batch]:
        """The data as a list of batches in memory."""
        return [self.data] if isinstance(self.data, tuple) else [(x, y) for x, y in self.data]

    def double(self) -> HessianProblem:
        """The same problem in float64."""
        batches = [(x.double() if x.is_floating_point() else x, y) for x, y in self.batches]
        return HessianProblem(copy.deepcopy(self.model).double(), self.loss_fn, batches)

    def gradients(self) -> list[tuple[Tensor, ...]]:
        """The gradient of each batch's share of the loss, with its graph."""
        samples = sum(len(x) for x, _ in self.batches)
        return [
            torch.autograd.grad(
                self.loss_fn(self.model(x), y) * (len(x) / samples), self.params, create_graph=True
            )
            for x, y in self.batches
        ]


def product(
    problem: HessianProblem, gradients: Sequence[Sequence[Tensor]], keep_graph: bool
) -> list[Tensor]:
    """Return H 1, one tensor for each parameter, from gradients with their graphs."""
    ones = [torch.ones_like(p) for p in problem.params]
    total = [torch.zeros_like(p) for p in problem.params]
    for grads in gradients:
        for t, h in zip(
            total,
            torch.autograd.grad(grads, problem.params, ones, retain_graph=keep_graph),
            strict=True,
        ):
            t += h
    return total


class UnfusedAttention(nn.Module):
    """A network with unfused attention, which autograd can differentiate twice."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        with sdpa_kernel(SDPBackend.MATH):
            y: Tensor = self.network(x)
        return y


@dataclass(frozen=True)
class ProblemRecipe:
    """How to make a problem.

    Attributes:
        summary: the network and the data, in one line.
        make: makes the network.
        read: reads so many samples of the data from a folder.
        samples: the number of samples.
        steps: steps of training, each on all data.
        lr: learning rate of these steps; their momentum is 0.9.
        batch: the size of a loader's batches; None for one batch.
        vectors: whether the cost of the solver's own vector arithmetic is in question. Then only
            solvers with `joins_vectors` take part.
        large: whether every contender solves it only once, within a limit of time.
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
        """The kind of problem, which decides the goals: "vectors", "loader" or "batch"."""
        if self.vectors:
            return "vectors"
        return "batch" if self.batch is None else "loader"

    def build(self, folder: Path) -> HessianProblem:
        """Train the network, the same at every call, and leave it in evaluation mode.

        Raises:
            MissingRequirement: the data are not in the folder.
        """
        inputs, labels = self.read(self.samples, folder)
        loss_fn = nn.CrossEntropyLoss()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
        opt = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
        for _ in range(self.steps):
            train_step(opt, HessianProblem(model, loss_fn, (inputs, labels)))
        opt.zero_grad()
        model.eval()  # PyHessian changes to this mode, whatever the model's mode was
        if self.batch is None:
            return HessianProblem(model, loss_fn, (inputs, labels))
        loader = DataLoader(TensorDataset(inputs, labels), batch_size=self.batch)
        return HessianProblem(model, loss_fn, loader)


def train_step(opt: torch.optim.Optimizer, problem: HessianProblem) -> None:
    """Take one training step on the first batch."""
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
    return UnfusedAttention(GPT(width=64, layers=2))


RECIPES: Mapping[str, ProblemRecipe] = {
    "mlp-digits": ProblemRecipe(
        "MLP 64-64-10, 400 digits", lambda: _mlp(64, 64, 10), problem_data.digits, 400
    ),
    "mlp-mnist": ProblemRecipe(
        "MLP 784-128-64-10, 512 images of MNIST",
        lambda: _mlp(784, 128, 64, 10),
        problem_data.mnist,
        512,
    ),
    "mlp-fashion": ProblemRecipe(
        "MLP 784-128-64-10, 512 images of Fashion-MNIST",
        lambda: _mlp(784, 128, 64, 10),
        problem_data.fashion,
        512,
    ),
    "conv-cifar10": ProblemRecipe(
        "three convolutions, 128 images of CIFAR-10", _conv, problem_data.cifar10, 128, lr=0.02
    ),
    "gpt-text": ProblemRecipe(
        "2-layer GPT, 4 x 64 characters of English", _gpt, problem_data.text, 4, lr=0.1
    ),
    "mlp-mnist-loader": ProblemRecipe(
        "MLP 784-128-64-10, a loader of 4 x 128 images of MNIST",
        lambda: _mlp(784, 128, 64, 10),
        problem_data.mnist,
        512,
        batch=128,
    ),
    "wide-cifar10": ProblemRecipe(
        "MLP 3072-4096-2816-10, 32 images of CIFAR-10",
        lambda: _mlp(3072, 4096, 2816, 10),
        problem_data.cifar10,
        32,
        steps=5,
        vectors=True,
        large=True,
    ),
    "resnet-cifar10": ProblemRecipe(
        "ResNet-18 of 24M parameters, 8 images of CIFAR-10",
        resnet18,
        problem_data.cifar10,
        8,
        steps=20,
        lr=0.02,
        large=True,
    ),
}
