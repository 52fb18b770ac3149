"""Full-batch training, with the sharpness beside the edge of the optimizer's filter."""

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
from eigenfilter.experiments.problems import Problem
from eigenfilter.optimizers import EigenfilterOptimizer

BAND = 0.10  # how far from the edge a sharpness may lie that is said to be at it
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
_SMALL = 100_000  # elements of the inputs, up to which threads gain nothing


@dataclass(frozen=True)
class Method:
    """An optimizer, and the hyperparameters it is built with in words."""

    name: str
    settings: str
    build: Callable[[Iterable[nn.Parameter]], EigenfilterOptimizer]


@dataclass(frozen=True)
class Check:
    """One measurement: the loss, and the largest Hessian eigenvalue with its residual.

    Attributes:
        edge: the largest eigenvalue that the optimizer's filter admits at this step.
    """

    step: int
    loss: float
    sharpness: float
    edge: float
    residual: float
    matvecs: int

    @property
    def ratio(self) -> float:
        """Sharpness over the edge."""
        return self.sharpness / self.edge


@dataclass
class Run:
    """One method's training; the final loss and sharpness are those of the last check."""

    method: str
    settings: str
    history: list[Check] = field(default_factory=list)
    outcome: str = ""
    train_accuracy: float = math.nan
    test_accuracy: float = math.nan
    seconds: float = 0.0

    @property
    def last(self) -> Check:
        return self.history[-1]

    def as_json(self) -> dict[str, object]:
        """Everything measured, the history last."""
        values = asdict(self)
        history = values.pop("history")
        return values | asdict(self.last) | {"ratio": self.last.ratio, "history": history}


class Training:
    """A network in training by one method on all of a problem's data at once.

    Args:
        problem: what it learns.
        method: the optimizer.
        seed: of the initial weights.

    Attributes:
        optimizer: the method's, whose hyperparameters may be changed between steps.
        step: how many were taken.
        run: what was measured.
    """

    def __init__(self, problem: Problem, method: Method, seed: int) -> None:
        self._problem, self._network = problem, problem.network(seed)
        self.optimizer = method.build(self._network.parameters())
        self.step = 0
        self.run = Run(method.name, method.settings)
        batch = (problem.data.inputs, problem.data.labels)
        self._operator = HessianOperator(self._network, problem.loss, batch)
        self._found: EigenResult | None = None
        self._began = time.perf_counter()

    def advance(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            self.optimizer.step(self._closure)
        self.step += steps

    def check(self) -> bool:
        """Measure the sharpness, from the eigenvector found the time before; False if diverged."""
        data = self._problem.data
        with torch.no_grad():
            loss = float(self._problem.loss(self._network(data.inputs), data.labels))
        self.run.seconds = time.perf_counter() - self._began
        found = self._curvature() if math.isfinite(loss) else None
        if found is None:
            self.run.outcome = "diverged"
            return False
        self._found = found
        edge = filters.of(self.optimizer)[0].max_eigenvalue()
        value, residual = float(found.values[0]), float(found.residuals[0])
        self.run.history.append(Check(self.step, loss, value, edge, residual, found.matvecs))
        return True

    def _curvature(self) -> EigenResult | None:
        """The largest eigenvalue, or None where the Hessian is no longer finite."""
        tol = _TOLERANCE[self._problem.data.inputs.dtype]
        try:
            return eigsh(self._operator, k=1, tol=tol, v0=self._found, check_multiplicity=False)
        except FloatingPointError:  # a loss nears overflow before it is infinite itself
            return None

    def finish(self) -> Run:
        """Measure the accuracies; return what was measured."""
        data = self._problem.data
        self.run.train_accuracy = self._accuracy(data.inputs, data.labels)
        self.run.test_accuracy = self._accuracy(data.test_inputs, data.test_labels)
        self.run.seconds = time.perf_counter() - self._began
        return self.run

    def _closure(self) -> Tensor:
        self.optimizer.zero_grad()
        data = self._problem.data
        loss = self._problem.loss(self._network(data.inputs), data.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def _accuracy(self, inputs: Tensor, labels: Tensor) -> float:
        return float((self._network(inputs).argmax(dim=1) == labels).double().mean())


@contextmanager
def threads_for(problem: Problem) -> Iterator[None]:
    """One thread where the matrices are too small to share between threads."""
    threads = torch.get_num_threads()
    if problem.data.inputs.numel() <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
