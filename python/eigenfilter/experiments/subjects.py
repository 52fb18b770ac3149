"""What curvature is measured of: a model with its loss, its data and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenfilter.curvature.loss.batch_trees import leaves
from eigenfilter.experiments import archives, checkpoint, datasets, imports
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Subject:
    """The four things that operators and certificates are made of.

    Attributes:
        model: on its device.
        loss_fn: (output, target) -> [], a mean over samples.
        data: a batch, a list of batches or a DataLoader.
        optimizer: of the model's parameters, or None where it is not known.
        about: where they come from, as plain data.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    data: Any
    optimizer: torch.optim.Optimizer | None
    about: dict[str, Any]


def trained(
    path: Path,
    device: torch.device,
    *,
    data_dir: Path | None = None,
    samples: int = 0,
    batch_size: int = 500,
) -> Subject:
    """The subject of a checkpoint of `eigenfilter train`.

    Args:
        path: the checkpoint, or the folder of its run.
        device: where to put the model and its data.
        data_dir: of the data, see `datasets.folder_of`.
        samples: training images at most, the first, without augmentation; 0: all.
        batch_size: of them, at a time.

    Raises:
        UserError: the checkpoint or the data cannot be read, or do not belong together.
    """
    if path.is_dir():
        path = path / checkpoint.FILE
    saved = checkpoint.read_run(path)
    try:
        config = Config.of(saved["config"])
        trainer = Trainer(config, datasets.load(config.dataset, data_dir), device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            trainer.load_state_dict(saved["trainer"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not fit: {error}") from error
    if trainer.data.checksum != saved["data"]:
        raise UserError(f"{path} was trained on other data than those found: give --data-dir")
    images, labels = trainer.examples(samples or len(trainer.data.images))
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))  # type: ignore[no-untyped-call]
    about = {
        "checkpoint": str(path),
        "step": trainer.step,
        "samples": len(images),
        "config": config.as_dict(),
    }
    return Subject(trainer.model, trainer.loss_fn, batches, trainer.optimizer, about)


def imported(
    model: str,
    data: str,
    device: torch.device,
    *,
    loss: str | None = None,
    optimizer: str | None = None,
    weights: Path | None = None,
) -> Subject:
    """The subject that import paths name, see `imports.named`.

    Args:
        model: a module, or a function that returns one.
        data: a batch (input, target), a list of batches, a DataLoader, or a function that returns
            one of them.
        device: where to put the model.
        loss: (output, target) -> [], a mean over samples; None for cross entropy.
        optimizer: a function from the model's parameters to their optimizer, or None.
        weights: a state_dict of the model, as torch.save writes it, or None.

    Raises:
        UserError: something is not what it must be.
    """
    network = imports.named(model)
    if not isinstance(network, nn.Module):
        network = _called(model, network)
    if not isinstance(network, nn.Module):
        raise UserError(f"{model} gives a {type(network).__name__}, not a torch.nn.Module")
    if weights is not None:
        state = archives.read(weights)
        try:
            network.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
            raise UserError(f"{weights} does not fit {model}: {_line(error)}") from error
    network.to(device)
    batches = imports.named(data)
    if callable(batches):
        batches = _called(data, batches)
    if isinstance(batches, tuple | list) and not list(leaves(batches)):
        raise UserError(f"{data} holds no tensors: give a batch (input, target), or several")
    loss_fn = nn.functional.cross_entropy if loss is None else imports.named(loss)
    made = None
    if optimizer is not None:
        made = _called(optimizer, imports.named(optimizer), network.parameters())
    about = {"model": model, "data": data, "loss": loss, "optimizer": optimizer}
    about["weights"] = None if weights is None else str(weights)
    return Subject(network, loss_fn, batches, made, about)


def _called(path: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # whatever a user's function raises
        raise UserError(f"{path} failed ({type(error).__name__}: {_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
