"""Full-batch training that measures the sharpness and the edge of the optimizer's filter."""

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
from eigenfilter.experiments.full_batch_problems import FullBatchProblem
from eigenfilter.optimizers import EigenfilterOptimizer

BAND = 0.10  # relative distance from the edge within which a sharpness counts as at the edge
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
_SMALL = 100_000  # elements of the inputs up to which more threads do not help


@dataclass(frozen=True)
class MethodSpec:
    """A method: its name, its hyperparameters as text, and the function that builds it."""

    name: str
    settings: str
    build: Callable[[Iterable[nn.Parameter]], EigenfilterOptimizer]


@dataclass(frozen=True)
class SharpnessMeasurement:
    """One measurement during training.

    Attributes:
        step: number of steps taken.
        loss: loss on all data.
        sharpness: largest eigenvalue of the Hessian.
        edge: largest eigenvalue that the optimizer's filter admits at this step.
        residual: ||H v - sharpness v|| of the eigenvector v.
        matvecs: Hessian-vector products of the measurement.
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
class FullBatchRun:
    """The training of one method. Its last measurement has the final loss and sharpness."""

    method: str
    settings: str
    history: list[SharpnessMeasurement] = field(default_factory=list)
    outcome: str = ""
    train_accuracy: float = math.nan
    test_accuracy: float = math.nan
    seconds: float = 0.0

    @property
    def last(self) -> SharpnessMeasurement:
        return self.history[-1]

    def as_json(self) -> dict[str, object]:
        """Return all measurements as plain data, with the history last."""
        values = asdict(self)
        history = values.pop("history")
        return values | asdict(self.last) | {"ratio": self.last.ratio, "history": history}


class FullBatchTraining:
    """Full-batch training of a network with one method.

    Args:
        problem: the network, the data and the loss.
        method: the method.
        seed: seed of the initial weights.

    Attributes:
        optimizer: the optimizer, whose hyperparameters may be changed between steps.
        step: number of steps taken.
        run: the measurements.
    """

    def __init__(self, problem: FullBatchProblem, method: MethodSpec, seed: int) -> None:
        self._problem, self._network = problem, problem.network(seed)
        self.optimizer = method.build(self._network.parameters())
        self.step = 0
        self.run = FullBatchRun(method.name, method.settings)
        batch = (problem.data.inputs, problem.data.labels)
        self._operator = HessianOperator(self._network, problem.loss, batch)
        self._eigenpair: EigenResult | None = None
        self._began = time.perf_counter()

    def advance(self, steps: int) -> None:
        """Take a number of steps."""
        for _ in range(steps):
            self.optimizer.step(self._closure)
        self.step += steps

    def check(self) -> bool:
        """Measure the loss and the sharpness, starting from the last eigenvector.

        Returns:
            Whether both are finite; if not, the run has diverged.
        """
        data = self._problem.data
        with torch.no_grad():
            loss = float(self._problem.loss(self._network(data.inputs), data.labels))
        self.run.seconds = time.perf_counter() - self._began
        pair = self._largest_eigenpair() if math.isfinite(loss) else None
        if pair is None:
            self.run.outcome = "diverged"
            return False
        self._eigenpair = pair
        edge = filters.of(self.optimizer)[0].max_eigenvalue()
        value, residual = float(pair.values[0]), float(pair.residuals[0])
        self.run.history.append(
            SharpnessMeasurement(self.step, loss, value, edge, residual, pair.matvecs)
        )
        return True

    def _largest_eigenpair(self) -> EigenResult | None:
        """Return the largest eigenpair, or None if the Hessian is not finite."""
        tol = _TOLERANCE[self._problem.data.inputs.dtype]
        try:
            return eigsh(self._operator, k=1, tol=tol, v0=self._eigenpair, check_multiplicity=False)
        except FloatingPointError:  # products overflow before the loss itself does
            return None

    def finish(self) -> FullBatchRun:
        """Measure the accuracies, and return all measurements."""
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
def threads_for(problem: FullBatchProblem) -> Iterator[None]:
    """Use one thread if the matrices are too small for more."""
    threads = torch.get_num_threads()
    if problem.data.inputs.numel() <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
