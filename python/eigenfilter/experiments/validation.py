"""What a checkpoint must hold to be gone on from: everything is checked before anything is used."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eigenfilter.experiments import factories
from eigenfilter.experiments.config import Config, check_plain
from eigenfilter.experiments.errors import UserError, quoted
from eigenfilter.experiments.files import read_json
from eigenfilter.experiments.schema import AtLeast, ListOf, Nullable, SchemaError, validate
from eigenfilter.optimizers._hyperparameters import rho_key

if TYPE_CHECKING:
    from eigenfilter.experiments.trainer import Trainer

TEST = {"epoch": float, "loss": Nullable(float), "accuracy": float}
TRAIN = {**TEST, "lr": float, "images_per_second": float}
SHARPNESS = {"epoch": float, "sharpness": float, "residual": float, "edge": Nullable(float)}


_LOSSES = {"loss": Nullable(float), "accuracy": float}
RESULTS: dict[str, dict[str, Any]] = {
    "complete": {
        "step": int,
        "epochs": float,
        "gradients": float,
        "seconds": float,
        "train": AtLeast(_LOSSES),
        "test": AtLeast(_LOSSES),
    },
    "stopped": {},
    "failed": {"error": str, "diverged": bool},
}
"""What is in the results of a run, by its outcome, besides its last records."""


def read_results(path: Path, *, whole: bool = True) -> dict[str, Any] | None:
    """The results of a run, if it has any: complete, stopped or failed.

    Args:
        path: the file.
        whole: whether more of it is used than its outcome and configuration.

    Raises:
        UserError: they are damaged.
    """
    remedy = f"remove {path} to have the run gone on with, or {path.parent} to have it taken again"
    try:
        found = read_json(path, remedy)
    except FileNotFoundError:
        return None
    try:
        validate(found, AtLeast({"outcome": str, "config": dict}), "it")
        if found["outcome"] not in RESULTS:
            raise SchemaError(f"its outcome is {quoted(found['outcome'])}")
        if whole:
            _check_results(found)
        check_plain(found["config"])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    return cast("dict[str, Any]", found)


def _check_results(found: dict[str, Any]) -> None:
    validate(found, AtLeast(RESULTS[found["outcome"]]), "it")
    if found.get("diverged"):
        validate(found, AtLeast({"step": int}), "it")
    if "sharpness" in found:
        validate(found["sharpness"], AtLeast(SHARPNESS), "its sharpness")


def check_trainer(found: Any, trainer: Trainer) -> None:
    """Check the state of a trainer against one that has just been made.

    Raises:
        Misfit: an entry is missing, too many, of another type, shape or dtype, or does not go with
            the step or the configuration.
    """
    config = trainer.config
    validate(found, AtLeast({"step": int, "losses": list}), "the trainer")
    step = found["step"]
    if not 0 <= step <= trainer.total_steps:
        raise SchemaError(f"its step is {step}, of {trainer.total_steps}")
    first = next(trainer.model.parameters())
    vector = torch.empty(sum(p.numel() for p in trainer.model.parameters()), dtype=first.dtype)
    looks = {"steps": int, "vector": Nullable(vector)}
    wanted = {
        "model": trainer.model.state_dict(),
        "step": step,
        "gradients": float,
        "optimizer": _optimizer(config, trainer.model, step, trainer.steps_per_epoch),
        "lr_schedule": {"last_epoch": step},
        "rho_schedule": {"step": step} if trainer.rho_is_scheduled else None,
        "losses": ListOf(float),
        "accuracies": [float] * len(found["losses"]),
        "random": dict,
        "others": ListOf(dict),
        "monitor": None if trainer.monitor is None else looks,
    }
    validate(found, wanted, "the trainer")
    if found["gradients"] < step * (1 - 1e-9):
        raise SchemaError(f"{found['gradients']} gradients are too few for {step} steps")
    for state in found["optimizer"]["state"].values():
        if "step" in state and state["step"] != step:
            raise SchemaError(f"its optimizer has taken {float(state['step']):g} steps, not {step}")
    _check_apart([found["optimizer"], found["monitor"]])
    for state in (found["random"], *found["others"]):
        _check_random(state, trainer.device)


def check_session(found: dict[str, Any], trainer: Trainer) -> int:
    """Check what a run keeps besides its trainer, whose state has been checked.

    Returns:
        The records that its log has.

    Raises:
        Misfit: as `check_trainer`.
    """
    config, step, per_epoch = trainer.config, found["trainer"]["step"], trainer.steps_per_epoch
    tests = [
        epoch * per_epoch
        for epoch in range(1, step // per_epoch + 1)
        if epoch % config.evaluate_every == 0 or epoch == config.epochs
    ]
    history = [{**TEST, "step": test, "epoch": test / per_epoch} for test in tests]
    validate(found["history"], history, "the history")
    finished = step == trainer.total_steps
    trained = step if finished else step - step % config.log_every
    validate(found["trainer"]["losses"], [float] * (step - trained), "its last losses")
    last: dict[str, Any] = {}
    if trained:
        rates = dict.fromkeys(trainer.rates(), float)
        last["train"] = {**TRAIN, **rates, "epoch": trained / per_epoch}
    if tests:
        last["test"] = {**TEST, "epoch": tests[-1] / per_epoch}
    looks = 0
    if every := config.sharpness_every:
        last["sharpness"] = {**SHARPNESS, "epoch": (step - step % every) / per_epoch}
        looks = 1 + step // every
        validate(found["trainer"]["monitor"], {"steps": step, "vector": Tensor}, "its monitor")
    validate(found["last"], last, "its last records")
    if found["seconds"] < 0 or found["log"] < 0:
        raise SchemaError("a time or a size is negative")
    steps = step // config.log_every + (finished and step % config.log_every > 0)
    return int(steps + len(tests) + looks)


def _optimizer(config: Config, model: nn.Module, step: int, per_epoch: int) -> dict[str, Any]:
    """The state of the optimizer after so many steps, except for the values in its tensors.

    It is that of another one over parameters of the same shapes, which takes a step.
    """
    params = [nn.Parameter(torch.zeros_like(p)) for p in model.parameters()]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = factories.build_optimizer(config, params)
    lr = factories.lr_schedule(config, optimizer, per_epoch)
    rho = factories.rho_schedule(config, optimizer, per_epoch)
    for group in optimizer.param_groups:
        if rho_key(group) in group:
            group[rho_key(group)] = 0.0  # a step without ascents
    if step:
        optimizer.step()
    for group, factor in zip(factories.base_of(optimizer).param_groups, lr.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(step)
    if rho is not None:
        rho.load_state_dict({"step": step})
    return optimizer.state_dict()


def _check_apart(found: Any) -> None:
    """Check that tensors which steps write into share no memory, with others or within."""
    ends: list[tuple[int, int]] = []
    left = [found]
    while left:
        value = left.pop()
        if isinstance(value, (dict, list, tuple)):
            left.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, Tensor) and value.numel():
            span = 1
            for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
                if size > 1 and stride < span:
                    raise SchemaError("elements of a tensor of the optimizer share memory")
                span += (size - 1) * stride
            ends.append((value.data_ptr(), value.data_ptr() + span * value.element_size()))
    ends.sort()
    if any(end > start for (_, end), (start, _) in pairwise(ends)):
        raise SchemaError("tensors of the optimizer share memory")


def _check_random(found: dict[str, Any], device: torch.device) -> None:
    """Check states of generators by setting others to them."""
    wanted: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if "cuda" in found:  # of a run on a GPU, gone on with on whatever device
        wanted["cuda"] = Tensor
    validate(found, wanted, "a state of generators")
    if not all(state.is_contiguous() for state in found.values()):  # torch takes no other
        raise SchemaError("a state of generators is not contiguous")
    try:
        torch.Generator().set_state(found["cpu"].clone())
        if "cuda" in found and device.type == "cuda":
            torch.Generator(device).set_state(found["cuda"].clone())
    except (RuntimeError, TypeError) as error:
        raise SchemaError(
            f"a state of generators is none ({str(error).splitlines()[0]})"
        ) from error
