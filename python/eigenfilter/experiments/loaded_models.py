"""Models with their loss, data and optimizer, loaded from a checkpoint or from user code."""

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
from eigenfilter.optimizers.extrapolation import ExtrapolatedOptimizer


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """The arguments of curvature operators and certificates.

    Attributes:
        model: the model, on its device.
        loss_fn: (output, target) -> [], a mean over samples.
        data: a batch, a list of batches or a DataLoader.
        optimizer: optimizer of the model's parameters, or None if it is not known.
        source: where the model comes from, as plain data.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    data: Any
    optimizer: torch.optim.Optimizer | None
    source: dict[str, Any]


def load_trained(
    path: Path,
    device: torch.device,
    *,
    data_dir: Path | None = None,
    samples: int = 0,
    batch_size: int = 500,
) -> LoadedModel:
    """Load a checkpoint of `eigenfilter train`, with its training images.

    Args:
        path: the checkpoint, or the folder of its run.
        device: device of the model and its data.
        data_dir: data folder; see `datasets.folder_of`.
        samples: number of the first training images to take, without augmentation; 0 takes all.
        batch_size: images per batch.

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
        raise UserError(
            f"{path} does not fit its own configuration: {error}; restore it, or train again"
        ) from error
    if trainer.data.checksum != saved["data"]:
        raise UserError(
            f"{path} was trained on other data; give the folder of its data with --data-dir"
        )
    if isinstance(trainer.optimizer, ExtrapolatedOptimizer):
        trainer.optimizer.eval()  # from an extrapolated point back to x
    images, labels = trainer.examples(samples or len(trainer.data.images))
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))  # type: ignore[no-untyped-call]
    source = {
        "checkpoint": str(path),
        "step": trainer.step,
        "samples": len(images),
        "config": config.as_dict(),
    }
    return LoadedModel(trainer.model, trainer.loss_fn, batches, trainer.optimizer, source)


def load_imported(
    model: str,
    data: str,
    device: torch.device,
    *,
    loss: str | None = None,
    optimizer: str | None = None,
    weights: Path | None = None,
) -> LoadedModel:
    """Load a model and its data from import paths; see `imports.import_object`.

    Args:
        model: a module, or a function that returns one.
        data: a batch (input, target), a list of batches, a DataLoader, or a function that returns
            one of these.
        device: device of the model.
        loss: (output, target) -> [], a mean over samples; None means cross entropy.
        optimizer: a function from the model's parameters to their optimizer, or None.
        weights: file with a state_dict of the model, as torch.save writes it, or None.

    Raises:
        UserError: an object cannot be imported or has the wrong type, or a function fails.
    """
    network = imports.import_object(model)
    if not isinstance(network, nn.Module):
        network = _call(model, network)
    if not isinstance(network, nn.Module):
        raise UserError(f"{model} gives a {type(network).__name__}, not a torch.nn.Module")
    if weights is not None:
        state = archives.read(weights)
        try:
            network.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
            raise UserError(f"{weights} does not fit {model}: {_line(error)}") from error
    network.to(device)
    batches = imports.import_object(data)
    if callable(batches):
        batches = _call(data, batches)
    if isinstance(batches, tuple | list) and not list(leaves(batches)):
        raise UserError(f"{data} contains no tensors; give a batch (input, target), or several")
    loss_fn = nn.functional.cross_entropy if loss is None else imports.import_object(loss)
    instance = None
    if optimizer is not None:
        instance = _call(optimizer, imports.import_object(optimizer), network.parameters())
    source = {"model": model, "data": data, "loss": loss, "optimizer": optimizer}
    source["weights"] = None if weights is None else str(weights)
    return LoadedModel(network, loss_fn, batches, instance, source)


def _call(path: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # a user's function may raise anything
        raise UserError(f"{path} failed ({type(error).__name__}: {_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
