"""One run of the study: training, with measurements of what it arrives at."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from methods import EVERY, LATE, METHODS
from problems import PROBLEMS, Pairs, Problem, Task, loss_fn
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.extrapolation import ExtrapolatedOptimizer, at_x
from eigenfilter.schedulers import RhoScheduler

STATISTICS = 40  # batches from which batch-norm statistics are estimated
POINTS = 6  # measurements of the sharpness in a run
AVERAGED = 0.1  # the share of training over which the average of the weights reaches back


def factor(problem: Problem, step: int) -> float:
    """The factor of lr at a step."""
    if not problem.cosine:
        return 1.0
    warmup = problem.steps // 20
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (problem.steps - warmup))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Pairs) -> tuple[float, float]:
    """Return the mean loss and the accuracy, in evaluation mode."""
    model.eval()
    loss, hits, count = 0.0, 0, 0
    for inputs, targets in batches:
        scores = model(inputs)
        loss += targets.numel() * loss_fn(scores, targets).item()
        hits += int((scores.argmax(1) == targets).sum())
        count += targets.numel()
    model.train()
    return loss / count, hits / count


class Sharpness:
    """The largest eigenvalue of the Hessian at the model's weights, on the probe."""

    def __init__(self, model: nn.Module, probe: tuple[Tensor, Tensor]) -> None:
        self._op = ef.curvature.HessianOperator(
            model, loss_fn, probe, mode="train", engine="cached_graph"
        )
        self._vectors: Tensor | None = None

    def __call__(self) -> float:
        """Measure it, from the eigenvectors of the last time on."""
        found = ef.curvature.eigsh(
            self._op, 2, tol=2e-2, v0=self._vectors, check_multiplicity=False
        )
        self._vectors = found.vectors
        return found.values[0].item()


class Gradient:
    """The closure of a step: it leaves the gradients of the loss on `batch`, and counts them."""

    def __init__(self, model: nn.Module, opt: EigenfilterOptimizer) -> None:
        self._model, self._opt, self.count = model, opt, 0
        self.batch: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> Tensor:
        """Evaluate the loss where the weights are."""
        assert self.batch is not None
        inputs, targets = self.batch
        self.count += 1
        self._opt.zero_grad()
        perturbed = self._opt.perturbed
        with ef.freeze_running_stats(self._model) if perturbed else nullcontext():
            loss = loss_fn(self._model(inputs), targets)
            torch.autograd.backward(loss)
        return loss


class Average:
    """An exponential moving average of the weights that the model has after each step."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._params = [p.detach() for p in model.parameters()]
        self._means = [p.clone() for p in self._params]
        self._horizon, self._step = max(1.0, AVERAGED * steps), 0

    def update(self) -> None:
        """Take the present weights in."""
        self._step += 1
        share = 1 / min(self._horizon, self._step)
        torch._foreach_lerp_(self._means, self._params, share)

    @torch.no_grad()
    def put(self) -> None:
        """Write the average into the model."""
        torch._foreach_copy_(self._params, self._means)


def is_finite(model: nn.Module) -> bool:
    """Whether all weights are finite."""
    return all(bool(p.isfinite().all()) for p in model.parameters())


class Measurement:
    """What is measured at a model's weights."""

    def __init__(self, model: nn.Module, task: Task, problem: Problem) -> None:
        self._model, self._task, self._batches = model, task, problem.batches
        self.sharpness = Sharpness(model, task.training(problem.probe))

    def accuracy(self, name: str) -> float:
        """Return the accuracy on a part."""
        return self._evaluate(name)[1]

    def all(self) -> dict[str, float]:
        """Return the sharpness, the training loss, and the accuracy on the test set."""
        result = {"sharpness": self.sharpness(), "training loss": self._evaluate("training")[0]}
        return result | {"test accuracy": self.accuracy("test")}

    def reestimate(self) -> bool:
        """Estimate batch-norm statistics at the weights; False if the model has none.

        The batches are augmented as those of training: normalized otherwise, the network would be
        another function than the one that was trained.
        """
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._model.modules()):
            return False
        torch.optim.swa_utils.update_bn(islice(self._task.batches(0), STATISTICS), self._model)
        return True

    def _evaluate(self, name: str) -> tuple[float, float]:
        return evaluate(self._model, self._part(name))

    def _part(self, name: str) -> Pairs:
        return islice(self._task.part(name), self._batches)


def _rho_schedule(opt: EigenfilterOptimizer, kind: str, problem: Problem) -> RhoScheduler | None:
    if kind == "constant":
        return None
    return RhoScheduler(opt, kind, total_steps=problem.steps, start=LATE, every=EVERY)


@cache
def load(name: str, folder: Path) -> Task:
    """The data of a problem, once in a process."""
    return PROBLEMS[name].load(folder)


def train(
    name: str, method: str, lr: float, seed: int, folder: Path, *, final: bool, short: bool
) -> dict[str, Any]:
    """Train once.

    A run that chooses lr is measured on the validation set alone, and the final ones on the test
    set. Seconds are CPU time of batches, gradients and updates, on one thread.

    Returns:
        What was measured; "diverged" is the step at which a loss was not finite, if one was.
    """
    torch.set_num_threads(1)
    problem = PROBLEMS[name].short() if short else PROBLEMS[name]
    task = load(name, folder)
    model = task.model(seed)
    opt = METHODS[method].build(model.parameters(), lr, problem)
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: factor(problem, t))
    rho_schedule = _rho_schedule(opt, METHODS[method].rho_schedule, problem)
    here, average = Measurement(model, task, problem), Average(model, problem.steps)
    gradient, batches, seconds = Gradient(model, opt), task.batches(seed), 0.0
    result: dict[str, Any] = {"problem": name, "method": method, "lr": lr, "seed": seed}
    result |= {"final": final, "path": []}

    for step in range(1, problem.steps + 1):
        start = time.process_time()
        gradient.batch = next(batches)
        loss = opt.step(gradient)
        lr_schedule.step()
        if rho_schedule is not None:
            rho_schedule.step()
        seconds += time.process_time() - start
        is_point = step % (problem.steps // POINTS) == 0
        if not math.isfinite(loss.item()) or (is_point and not is_finite(model)):
            return result | {"diverged": step}
        average.update()
        if final and is_point:
            with at_x(opt):
                result["path"].append([step, seconds, here.sharpness()])
    if not is_finite(model):
        return result | {"diverged": problem.steps}
    if isinstance(opt, ExtrapolatedOptimizer):
        opt.eval()
    result |= {"gradients": gradient.count / problem.steps, "seconds": seconds}
    if not final:
        return result | {"validation accuracy": here.accuracy("validation")}
    result |= here.all()
    if here.reestimate():
        result["re-estimated accuracy"] = here.accuracy("test")
    average.put()
    here.reestimate()
    return result | {"average": here.all()}
