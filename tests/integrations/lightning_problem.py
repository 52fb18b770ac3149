"""A module of Lightning, and the training that Lightning should do, written out in torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigenfilter as ef
from eigenfilter.integrations.lightning import SharpnessAwareCallback

BATCHES = 10
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
Batch = Sequence[Tensor]


class Problem(pl.LightningModule):
    """Batch norm, dropout, and random numbers that depend on the batch alone."""

    def __init__(self, make_optimizer: MakeOptimizer, dropout: float = 0.5) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(*layers, nn.Linear(8, 2))
            for p in self.parameters():
                nn.init.normal_(p, std=0.5)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def dataset() -> TensorDataset:
    gen = torch.Generator().manual_seed(5)
    size = 6 * BATCHES
    return TensorDataset(torch.randn(size, 4, generator=gen), torch.randn(size, 2, generator=gen))


def loader() -> DataLoader[Any]:
    return DataLoader(dataset(), 6)


def batches(dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [[t.to(dtype) for t in batch] for batch in loader()]


def trainer_of(*callbacks: pl.Callback, package: Any = pl, **options: Any) -> Any:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": 2,
        "precision": None if "plugins" in options else "64-true",
    }
    return package.Trainer(callbacks=[SharpnessAwareCallback(), *callbacks], **(defaults | options))


def windows(epoch: Sequence[Batch], accumulation: int) -> list[list[tuple[int, Batch]]]:
    """The micro-batches of each step, with their indices."""
    pairs = list(enumerate(epoch))
    return [pairs[i : i + accumulation] for i in range(0, len(pairs), accumulation)]


def by_hand(
    module: Problem,
    accumulations: Sequence[int],
    clip: Callable[[list[nn.Parameter]], Any] = lambda params: None,
    epoch: Sequence[Batch] | None = None,
    after_step: Callable[[], Any] = lambda: None,
    scaler: torch.amp.GradScaler | None = None,
    context: Callable[[], Any] = nullcontext,
) -> list[float]:
    """Train with the accumulation of each epoch; return the loss of every micro-batch at x.

    Lightning divides by the accumulation also in an incomplete window.
    """
    opt: Any = module.configure_optimizers()
    params = list(module.parameters())
    finite_difference = opt.perturbation.repeats_random_numbers
    losses = []
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for accumulation in accumulations:
        for window in windows(batches() if epoch is None else epoch, accumulation):

            def evaluate(passes: int, window: Any = window, n: int = accumulation) -> list[Tensor]:
                values = []
                frozen = ef.freeze_running_stats(module) if passes else nullcontext()
                with opt.evaluation(), frozen, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
                    for i, batch in window:
                        if passes == 0 or (finite_difference and passes == 1):
                            torch.manual_seed(i)
                        with context():
                            values.append(module.loss(batch))
                        loss = scaler.scale(values[-1] / n)
                        loss.backward(create_graph=opt.needs_graph)
                return values

            opt.zero_grad()
            losses += [float(loss.detach()) for loss in evaluate(0)]
            passes = 0
            while opt.ascend(scaler):
                passes += 1
                evaluate(passes)
            scaler.unscale_(opt)
            clip(params)
            scaler.step(opt)
            scaler.update()
            after_step()
    return losses


def double(module: Problem) -> Problem:
    """A copy in float64, as "64-true" makes it."""
    return copy.deepcopy(module).double()


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two state_dicts, relative to 1."""
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    return max(
        float((states[0][k].double() - states[1][k].double()).abs().max()) for k in states[0]
    )
