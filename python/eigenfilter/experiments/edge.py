"""Train a network until its sharpness sits at the edge of the optimizer's filter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from eigenfilter import filters
from eigenfilter.curvature import EigenResult, HessianOperator, eigsh
from eigenfilter.experiments.data import Split
from eigenfilter.experiments.models import tanh_network
from eigenfilter.optimizers import EigenfilterOptimizer

EVERY = 25  # steps between two checks of the sharpness
HOLD = 40  # checks in a row within BAND of the edge that end a run
BAND = 0.10


@dataclass(frozen=True)
class Method:
    """An optimizer, and the hyperparameters it is built with in words."""

    name: str
    settings: str
    build: Callable[[Iterable[nn.Parameter]], EigenfilterOptimizer]


@dataclass(frozen=True)
class Check:
    """One measurement: the loss, and the largest Hessian eigenvalue with its residual."""

    step: int
    loss: float
    sharpness: float
    residual: float
    matvecs: int


@dataclass
class Run:
    """One method's training; the final loss and sharpness are those of the last check."""

    method: str
    settings: str
    edge: float
    history: list[Check] = field(default_factory=list)
    outcome: str = "not at its edge: steps spent"
    train_accuracy: float = math.nan
    test_accuracy: float = math.nan
    seconds: float = 0.0

    @property
    def last(self) -> Check:
        return self.history[-1]

    @property
    def ratio(self) -> float:
        """Final sharpness over the edge."""
        return self.last.sharpness / self.edge

    def at_edge(self) -> bool:
        """Whether the sharpness has reached the edge and kept within BAND of it for HOLD checks.

        Both are asked for: a slow climb through the band is not an edge.
        """
        ratios = [check.sharpness / self.edge for check in self.history]
        recent = ratios[-HOLD:]
        settled = len(recent) == HOLD and all(abs(ratio - 1.0) <= BAND for ratio in recent)
        return settled and max(ratios) >= 1.0

    def as_json(self) -> dict[str, object]:
        """Everything measured, the history last."""
        values = asdict(self)
        history = values.pop("history")
        return values | asdict(self.last) | {"ratio": self.ratio, "history": history}


def square_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared distance [] of output [n, classes] from target [n, classes], mean over samples."""
    return (output - target).square().sum(dim=1).mean()


class _Gauge:
    """Measures the sharpness; each time it starts from the eigenvector found the time before."""

    def __init__(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self._operator = HessianOperator(network, square_loss, (inputs, targets))
        self._found: EigenResult | None = None

    def check(self, step: int, loss: float) -> Check:
        found = eigsh(self._operator, k=1, tol=1e-7, v0=self._found, look_for_copies=False)
        self._found = found
        return Check(step, loss, float(found.values[0]), float(found.residuals[0]), found.matvecs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The matrices are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train_to_edge(
    method: Method,
    data: Split,
    *,
    seed: int,
    max_steps: int,
    deadline: float,
    on_check: Callable[[Run], None],
) -> Run:
    """Train the small tanh network, full batch, until it is at its edge or a limit ends it.

    Args:
        method: the optimizer.
        data: what to learn and to test on.
        seed: of the initial weights.
        max_steps: limit of the steps, rounded up to a multiple of EVERY.
        deadline: limit of the time, by `time.perf_counter`; the first check is always made.
        on_check: called after each check.

    Returns:
        The run, whose `outcome` says how it ended.
    """
    began = time.perf_counter()
    network = tanh_network(seed)
    optimizer = method.build(network.parameters())
    inputs, targets = data.inputs, data.targets
    gauge = _Gauge(network, inputs, targets)
    run = Run(method.name, method.settings, filters.of(optimizer)[0].max_eigenvalue())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = square_loss(network(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for step in range(0, max_steps + EVERY, EVERY):
        with torch.no_grad():
            loss = float(square_loss(network(inputs), targets))
        if not math.isfinite(loss):
            run.outcome = "diverged"
            break
        run.history.append(gauge.check(step, loss))
        on_check(run)
        if run.at_edge():
            run.outcome = "at its edge"
            break
        if time.perf_counter() >= deadline:
            run.outcome = "not at its edge: time spent"
            break
        if step < max_steps:
            for _ in range(EVERY):
                optimizer.step(closure)
    run.train_accuracy = _accuracy(network, data.inputs, data.labels)
    run.test_accuracy = _accuracy(network, data.test_inputs, data.test_labels)
    run.seconds = time.perf_counter() - began
    return run


@torch.no_grad()
def _accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return float((network(inputs).argmax(dim=1) == labels).double().mean())
