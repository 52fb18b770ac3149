"""Images a second in training: a step of USAM beside two gradients and one update by torch's SGD.

Both run the training loop of `eigenfilter train` on CIFAR-10, with the same batches, cropped and
flipped on the device. Both record losses and accuracies, and schedule the learning rate. The second
computes both gradients at the same point and updates with torch.optim.SGD(fused=True).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import environment, report
from benchmarks.comparison import Contender, Phase, do_nothing
from benchmarks.timing import Spread, clock, interleave
from eigenfilter.experiments import datasets
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.trainer import Trainer

MODEL, BATCH = "wrn-16-2", 32
ROUNDS = 9
GOALS = {"cpu": 1.08, "cuda": 1.03}
LIBRARY, TORCH = "USAM", "two gradients, torch SGD"


class TwoGradients(Trainer):
    """The loop with torch's optimizer: as many gradients as USAM needs, and one update."""

    def advance(self) -> None:
        """Take the next step."""
        if self.step == 0:
            self._sgd = torch.optim.SGD(
                self.model.parameters(), self.config.lr, momentum=self.config.momentum, fused=True
            )
            self._lr = LambdaLR(self._sgd, self._lr.lr_lambdas[0])
        epoch, index = divmod(self.step, self.steps_per_epoch)
        images, labels = self._batches.batch(epoch, index)
        for gradient in range(2):
            self._sgd.zero_grad()
            scores = self.model(images)
            loss = F.cross_entropy(scores, labels)
            torch.autograd.backward(loss)
            if gradient == 0:
                self._losses.append(loss.detach())
                self._accuracies.append((scores.detach().argmax(dim=1) == labels).double().mean())
        self._sgd.step()
        self._lr.step()
        self.step += 1


def run(
    model: str, batch: int, data: Path | None, device: torch.device, rounds: int, folder: Path
) -> None:
    """Time both in turns, print the table, write the results.

    Args:
        model: name of a network for CIFAR-10.
        batch: samples of a batch.
        data: the folder with CIFAR-10; None for the usual one.
        device: the device to train on.
        rounds: rounds of timing.
        folder: the folder for the results.

    Raises:
        UserError: the data are not there.
        ValueError: no model has that name.
    """
    where = environment.describe(device)
    config = Config(
        dataset="cifar10",
        model=model,
        batch_size=batch,
        crop=4,
        flip=True,
        optimizer="usam",
        lr=0.01,
        epochs=1000,
        deterministic=False,
    )
    images = datasets.load("cifar10", data)
    trainers = {
        LIBRARY: Trainer(config, images, device),
        TORCH: TwoGradients(config, images, device),
    }
    timings = interleave(
        [Contender(name, (Phase(do_nothing, _step(t)),), list) for name, t in trainers.items()],
        clock("wall", device),
        repeat=rounds,
    )
    seconds = {name: [timing.seconds for timing in timings[name]] for name in trainers}
    cost = Spread.of([a / b for a, b in zip(seconds[LIBRARY], seconds[TORCH], strict=True)])
    speeds = {name: Spread.of([batch / s for s in times]) for name, times in seconds.items()}
    goal = GOALS[device.type]
    lines = ["| loop | images a second |", "| --- | --- |"]
    lines += [f"| {n} | {s.median:.4g} [{s.low:.4g}, {s.high:.4g}] |" for n, s in speeds.items()]
    verdict = "met" if cost.median <= goal else "missed"
    lines += [
        "",
        f"{model}, batch of {batch}: USAM's step takes {cost.median:.3f} "
        f"[{cost.low:.3f}, {cost.high:.3f}] times as long. The goal, at most {goal}, is {verdict}.",
    ]
    print("\n".join(lines))
    results = {
        "loop": {
            "model": model,
            "batch": batch,
            "cost": asdict(cost),
            "images_per_second": {name: asdict(speed) for name, speed in speeds.items()},
        }
    }
    title = "# Images a second in training on CIFAR-10"
    report.write(folder, f"{device.type}-loop", where, [title, "", *lines], results)


def _step(trainer: Trainer) -> Callable[[], object]:
    """A step of training; every 50 steps it collects the losses, as the training log does."""

    def step() -> None:
        trainer.advance()
        if trainer.pending >= 50:
            trainer.drain()

    return step
