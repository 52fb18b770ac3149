"""Keep the sharpness at a target while lr decays, and draw it beside runs without control.

    python examples/sharpness_control.py out/control --data DIR

The script trains each problem three times: with `SharpnessController`, with the constant
extrapolation that `filters.design` gives at the first lr, and without extrapolation. It measures
the sharpness of x on the probe every few steps by an operator of its own, and writes
sharpness_control.png and sharpness_control.md into the folder. The share of steps counts the
measurements within 10% of the target, from the first one on that reached 90% of it. The time of the
control is all that the controller's step takes, over the time of the training steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eigenfilter as ef

BAND = 0.1
COLORS = {"controlled": "#0072b2", "constant e": "#d55e00", "e = 0": "#999999"}

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def square_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Half the squared distance from the labels' unit vectors."""
    return 0.5 * (scores - nn.functional.one_hot(labels, 10)).square().sum(1).mean()


def digits(root: Path) -> Data:
    """scikit-learn's 1,797 digits, centered."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    x = torch.tensor(inputs / 16.0, dtype=torch.float32)
    return x - x.mean(0), torch.tensor(labels)


def mnist(root: Path) -> Data:
    """The training images of MNIST, standardized."""
    from torchvision.datasets import MNIST

    data = MNIST(str(root), train=True)
    return (data.data.float() / 255.0 - 0.1307) / 0.3081, data.targets


def cifar10(root: Path) -> Data:
    """The first 20,000 training images of CIFAR-10, standardized."""
    raw = [(root / f"cifar-10-batches-bin/data_batch_{i}.bin").read_bytes() for i in (1, 2)]
    rows = torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).float() / 64.0 - 2.0, rows[:, 0].long()


def mlp(inputs: int, hidden: int, activation: type[nn.Module]) -> nn.Module:
    """A network with one hidden layer."""
    layers = nn.Flatten(), nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, 10)
    return nn.Sequential(*layers)


def convnet() -> nn.Module:
    """Three convolutions, 20,000 parameters."""
    layers: list[nn.Module] = []
    for into, out in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


@dataclass(frozen=True)
class Problem:
    """A training problem; `batch` 0 stands for all data."""

    title: str
    data: Callable[[Path], Data]
    build: Callable[[], nn.Module]
    loss: Loss
    lr: float
    target: float
    steps: int
    batch: int = 0
    every: int = 200
    probe: int = 1024
    measure: int = 10
    e_start: bool = True


PROBLEMS = {
    "digits": Problem(
        "digits, full batch",
        digits,
        lambda: mlp(64, 100, nn.Tanh),
        square_loss,
        lr=0.1,
        target=6.0,
        steps=6000,
        probe=1797,
    ),
    "mnist": Problem(
        "MNIST MLP, batch 128",
        mnist,
        lambda: mlp(784, 64, nn.ReLU),
        square_loss,
        lr=0.05,
        target=7.0,
        steps=4000,
        batch=128,
        every=200,
        probe=512,
        measure=20,
    ),
    "cifar10": Problem(
        "CIFAR-10 convnet, batch 128",
        cifar10,
        convnet,
        nn.functional.cross_entropy,
        lr=0.05,
        target=10.0,
        steps=1500,
        batch=128,
        every=100,
        probe=256,
        measure=25,
    ),
}


@dataclass
class Run:
    """A training run: its measurements, and what the control took."""

    name: str
    seed: int
    steps: list[int] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    e: list[float] = field(default_factory=list)
    checks: list[tuple[int, float, float | None, int]] = field(default_factory=list)
    training_seconds: float = 0.0
    control_seconds: float = 0.0
    loss: float = math.nan

    def within(self, target: float) -> float:
        """The share of the measurements within the band, once the band was reached."""
        reached = [i for i, s in enumerate(self.sharpness) if s >= (1 - BAND) * target]
        if not reached:
            return 0.0
        after = self.sharpness[reached[0] :]
        return sum(abs(s / target - 1) <= BAND for s in after) / len(after)


class Probe:
    """Measures the sharpness of x on the probe, in a copy of the model."""

    def __init__(self, problem: Problem, model: nn.Module, data: Data) -> None:
        self.twin = copy.deepcopy(model)
        probe = data[0][: problem.probe], data[1][: problem.probe]
        op = ef.curvature.HessianOperator(self.twin, problem.loss, probe, engine="cached_graph")
        plain = torch.optim.SGD(self.twin.parameters(), lr=1.0)
        self.monitor = ef.SharpnessMonitor(op, plain, tol=3e-3)

    def measure(self, opt: ef.SGD) -> float:
        with torch.no_grad():
            for x, group in ((self.twin.parameters(), opt.param_groups[0]),):
                for into, y in zip(x, group["params"], strict=True):
                    m = opt.state[y].get("momentum_buffer")
                    e = group["extrapolated"]
                    into.copy_(y if m is None else y + e * m)
        return self.monitor.check().sharpness


def train(problem: Problem, data: Data, name: str, seed: int, **options: Any) -> Run:
    """Train with, without, or with a constant extrapolation."""
    torch.manual_seed(seed)
    model, run = problem.build(), Run(name, seed)
    e = max(1.9 / problem.target - problem.lr / 2, 0.0) if name == "constant e" else 0.0
    opt = ef.SGD(model.parameters(), lr=problem.lr, momentum=0.9, extrapolation=e)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, problem.steps)
    controller = None
    if name == "controlled":
        part = data[0][: problem.probe], data[1][: problem.probe]
        op = ef.curvature.HessianOperator(model, problem.loss, part, engine="cached_graph")
        controller = ef.SharpnessController(op, opt, problem.target, every=problem.every, **options)
    probe = Probe(problem, model, data)
    for step in range(1, problem.steps + 1):
        start = time.perf_counter()
        x, y = data
        if problem.batch:
            chosen = torch.randint(len(x), (problem.batch,))
            x, y = x[chosen], y[chosen]
        opt.zero_grad()
        loss = problem.loss(model(x), y)
        loss.backward()
        opt.step()
        schedule.step()
        middle = time.perf_counter()
        if controller is not None:
            controller.step()
        run.training_seconds += middle - start
        run.control_seconds += time.perf_counter() - middle
        if step % problem.measure == 0:
            run.steps.append(step)
            run.sharpness.append(probe.measure(opt))
            run.lr.append(opt.param_groups[0]["lr"])
            run.e.append(opt.param_groups[0]["extrapolation"])
    opt.eval()
    with torch.no_grad():
        run.loss = problem.loss(model(data[0][:5000]), data[1][:5000]).item()
    if controller is not None:
        run.checks = [(c.step, c.sharpness, c.edge, c.matvecs) for c in controller.history]
    return run
