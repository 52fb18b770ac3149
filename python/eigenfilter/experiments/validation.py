"""Checks of checkpoints and results: everything is checked before anything is used."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eigenfilter.controller import RECENT
from eigenfilter.experiments import factories
from eigenfilter.experiments.config import Config, check_plain
from eigenfilter.experiments.errors import UserError, quoted
from eigenfilter.experiments.files import read_json
from eigenfilter.experiments.schema import HasEntries, ListOf, Nullable, SchemaError, validate
from eigenfilter.optimizers.hyperparameters import rho_key
from eigenfilter.optimizers.updates import EXTRAPOLATED, EXTRAPOLATION

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
        "train": HasEntries(_LOSSES),
        "test": HasEntries(_LOSSES),
    },
    "stopped": {},
    "failed": {"error": str, "diverged": bool},
}
"""Schema of the results of a run by its outcome, without its last records."""


def read_results(path: Path, *, whole: bool = True) -> dict[str, Any] | None:
    """Read the results of a run that is complete, stopped or failed; None if there are none.

    Args:
        path: the file.
        whole: whether to check all entries, or only the outcome and the configuration.

    Raises:
        UserError: the results are damaged.
    """
    remedy = f"remove {path} to resume the run, or {path.parent} to start it again"
    try:
        results = read_json(path, remedy)
    except FileNotFoundError:
        return None
    try:
        validate(results, HasEntries({"outcome": str, "config": dict}), "it")
        if results["outcome"] not in RESULTS:
            raise SchemaError(f"its outcome is {quoted(results['outcome'])}")
        if whole:
            _check_results(results)
        check_plain(results["config"])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    return cast("dict[str, Any]", results)


def _check_results(results: dict[str, Any]) -> None:
    validate(results, HasEntries(RESULTS[results["outcome"]]), "it")
    if results.get("diverged"):
        validate(results, HasEntries({"step": int}), "it")
    if "sharpness" in results:
        validate(results["sharpness"], HasEntries(SHARPNESS), "its sharpness")


def check_trainer(state: Any, trainer: Trainer) -> None:
    """Check the state of a trainer against a new trainer of the same configuration.

    Raises:
        SchemaError: an entry is missing, is not expected, has another type, shape or dtype, or does
            not fit the step or the configuration.
    """
    config = trainer.config
    validate(state, HasEntries({"step": int, "losses": list}), "the trainer")
    step = state["step"]
    if not 0 <= step <= trainer.total_steps:
        raise SchemaError(f"its step is {step}, of {trainer.total_steps}")
    schema = {
        "model": trainer.model.state_dict(),
        "step": step,
        "gradients": float,
        "optimizer": _optimizer(config, trainer.model, step, trainer.steps_per_epoch),
        "lr_schedule": {"last_epoch": step},
        "rho_schedule": _rho_schedule(step) if trainer.rho_is_scheduled else None,
        "losses": ListOf(float),
        "accuracies": [float] * len(state["losses"]),
        "random": dict,
        "others": ListOf(dict),
        "monitor": None if trainer.monitor is None else _monitor(trainer),
    }
    validate(state, schema, "the trainer")
    if config.sharpness_target:
        _check_controller(state["monitor"], state["optimizer"]["param_groups"][0], step)
    if state["gradients"] < step * (1 - 1e-9):
        raise SchemaError(f"{state['gradients']} gradients are too few for {step} steps")
    for entry in state["optimizer"]["state"].values():
        if "step" in entry and entry["step"] != step:
            raise SchemaError(f"its optimizer has taken {float(entry['step']):g} steps, not {step}")
    _check_no_shared_memory([state["optimizer"], state["monitor"]])
    for random in (state["random"], *state["others"]):
        _check_generators(random, trainer.device)


def check_session(saved: dict[str, Any], trainer: Trainer) -> int:
    """Check the entries of a checkpoint other than the trainer's, after `check_trainer`.

    Returns:
        The number of records that the log had when the checkpoint was written.

    Raises:
        SchemaError: see `check_trainer`.
    """
    config, step, per_epoch = trainer.config, saved["trainer"]["step"], trainer.steps_per_epoch
    tests = [
        epoch * per_epoch
        for epoch in range(1, step // per_epoch + 1)
        if epoch % config.evaluate_every == 0 or epoch == config.epochs
    ]
    history = [{**TEST, "step": test, "epoch": test / per_epoch} for test in tests]
    validate(saved["history"], history, "the history")
    finished = step == trainer.total_steps
    trained = step if finished else step - step % config.log_every
    validate(saved["trainer"]["losses"], [float] * (step - trained), "its last losses")
    last: dict[str, Any] = {}
    if trained:
        rates = dict.fromkeys(trainer.rates(), float)
        last["train"] = {**TRAIN, **rates, "epoch": trained / per_epoch}
    if tests:
        last["test"] = {**TEST, "epoch": tests[-1] / per_epoch}
    measurements = 0
    if every := config.checks_every:
        monitor = saved["trainer"]["monitor"]
        validate(monitor, HasEntries({"steps": step, "vector": Tensor}), "its monitor")
        measured, measurements = step - step % every, 1 + step // every
        if config.sharpness_target:
            measured, measurements = monitor["_checked"], monitor["_checks"]
        own = dict.fromkeys(trainer.controlled(), float)
        last["sharpness"] = {**SHARPNESS, **own, "epoch": measured / per_epoch}
    validate(saved["last"], last, "its last records")
    if saved["seconds"] < 0 or saved["log"] < 0:
        raise SchemaError("a time or a size is negative")
    steps = step // config.log_every + (finished and step % config.log_every > 0)
    return int(steps + len(tests) + measurements)


def _monitor(trainer: Trainer) -> dict[str, Any]:
    """Return the schema of the state of the monitor, or of the controller."""
    params = list(trainer.model.parameters())
    n, dtype = sum(p.numel() for p in params), params[0].dtype
    if not trainer.config.sharpness_target:
        return {"steps": int, "vector": Nullable(torch.empty(n, dtype=dtype))}
    assert trainer.monitor is not None
    own = {name: type(value) for name, value in trainer.monitor.state_dict().items()}
    scalars = 3 if "betas" in trainer.optimizer.param_groups[0] else 4  # that a design depends on
    return own | {
        "vector": torch.empty(n, 2, dtype=dtype),
        "_recent": ListOf(float),
        "saturated": Nullable(str),  # see `_check_controller`
        "actuators": [(float, bool, Nullable((float,) * scalars))],
    }


def _check_controller(state: dict[str, Any], group: dict[str, Any], step: int) -> None:
    """Check the state of a controller against the step and the optimizer's group."""
    key = EXTRAPOLATION if EXTRAPOLATION in group else rho_key(group)
    [(value, _, scalars)] = state["actuators"]
    if scalars is not None and group[key] != value:
        raise SchemaError(f"its {key} is {group[key]}, and its controller has set {value}")
    if not 0 < state["_checked"] <= step < state["_next"]:
        raise SchemaError("the steps of its controller's checks are impossible")
    if not 0 < len(state["_recent"]) == min(state["_checks"], RECENT):
        raise SchemaError("its controller has another number of checks")
    if state["saturated"] not in (None, "sharp", "flat"):
        raise SchemaError(f"its controller is saturated {quoted(state['saturated'])}")


def _optimizer(config: Config, model: nn.Module, step: int, per_epoch: int) -> dict[str, Any]:
    """Return the expected state of the optimizer after a number of steps.

    The values in its tensors have no meaning. The state comes from a new optimizer over parameters
    of the same shapes, which has taken one step.
    """
    params = [nn.Parameter(torch.zeros_like(p)) for p in model.parameters()]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = factories.build_optimizer(config, params)
    lr = factories.lr_schedule(config, optimizer, per_epoch)
    ascending = [group for group in optimizer.param_groups if rho_key(group) in group]
    radii = [group[rho_key(group)] for group in ascending]
    for group in ascending:
        group[rho_key(group)] = 0.0  # so that the step takes no ascent
    if step:
        optimizer.step()
    for group, radius in zip(ascending, radii, strict=True):
        group[rho_key(group)] = radius
    rho = factories.rho_schedule(config, optimizer, per_epoch)
    for group, factor in zip(factories.base_of(optimizer).param_groups, lr.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(step)
    if rho is not None:
        rho.load_state_dict(_rho_schedule(step))
    state = optimizer.state_dict()
    if config.sharpness_target:  # the controller has set one of these
        for group in state["param_groups"]:
            names = (EXTRAPOLATION, EXTRAPOLATED) if EXTRAPOLATION in group else (rho_key(group),)
            group.update(dict.fromkeys(names, float))
    return state


def _rho_schedule(step: int) -> dict[str, int]:
    """Return the expected state of the scheduler of rho after a number of steps."""
    return {"last_epoch": step, "_step_count": step + 1}


def _check_no_shared_memory(state: Any) -> None:
    """Check that tensors which steps write to share no memory, among each other or within."""
    ends: list[tuple[int, int]] = []
    pending = [state]
    while pending:
        value = pending.pop()
        if isinstance(value, (dict, list, tuple)):
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, Tensor) and value.numel():
            # Elements are distinct if each stride, in ascending order, is at least the extent of
            # the dimensions with smaller strides.
            span = 1
            for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
                if size > 1 and stride < span:
                    raise SchemaError("elements of a tensor of the optimizer share memory")
                span += (size - 1) * stride
            ends.append((value.data_ptr(), value.data_ptr() + span * value.element_size()))
    ends.sort()
    if any(end > start for (_, end), (start, _) in pairwise(ends)):
        raise SchemaError("tensors of the optimizer share memory")


def _check_generators(states: dict[str, Any], device: torch.device) -> None:
    """Check states of random generators by setting new generators to them."""
    schema: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if "cuda" in states:  # a run on a GPU may be resumed on another device
        schema["cuda"] = Tensor
    validate(states, schema, "a state of generators")
    if not all(state.is_contiguous() for state in states.values()):  # torch requires it
        raise SchemaError("a state of generators is not contiguous")
    try:
        torch.Generator().set_state(states["cpu"].clone())
        if "cuda" in states and device.type == "cuda":
            torch.Generator(device).set_state(states["cuda"].clone())
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SchemaError(f"a state of generators is invalid ({reason})") from error
