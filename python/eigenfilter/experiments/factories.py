"""Factories of the loss, the optimizer and the schedules of a configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import eigenfilter as ef
from eigenfilter.experiments import losses
from eigenfilter.experiments.config import NAMES as CONFIG_NAMES
from eigenfilter.experiments.config import TORCH, Config
from eigenfilter.optimizers import EigenfilterOptimizer, registry
from eigenfilter.optimizers.hyperparameters import rho_key
from eigenfilter.optimizers.perturbation import Perturbation
from eigenfilter.optimizers.registry import OPTIMIZERS, PERTURBATIONS, method_and_options
from eigenfilter.schedulers import RhoScheduler

Loss = Callable[[Tensor, Tensor], Tensor]

_UNSUPPORTED = ("LBFGS", "SparseAdam", "Optimizer")
"""Optimizers of torch.optim that cannot step from dense gradients alone."""


def build_loss(config: Config) -> Loss:
    """Return the loss [] of scores [b, classes] and labels [b], a mean over samples."""
    if config.loss == "cross_entropy":
        smoothing = config.label_smoothing

        def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(scores, labels, label_smoothing=smoothing)

        return cross_entropy

    return losses.square


def build_optimizer(config: Config, params: Iterable[nn.Parameter]) -> EigenfilterOptimizer:
    """Return the optimizer of the parameters.

    An optimizer of torch is wrapped in `SharpnessAware`. Without a method, its step is torch's and
    costs one gradient.

    Raises:
        ValueError: hyperparameters do not go together.
    """
    name = config.optimizer
    if name.startswith(TORCH):
        return _wrap_torch_optimizer(config, params)
    method, _ = method_and_options(name)
    make, own = OPTIMIZERS[method], {}
    if method in registry.updates():
        own = _ascent_arguments(config)
    elif method in PERTURBATIONS:
        own = {"rho": config.rho} | _method_options(config, name)
    elif config.has_rho:
        own = {"rho": config.rho}
    if config.state_bits:
        own["state_bits"] = config.state_bits
    return make(params, **_hyperparameters(config, make), **own)


def build_perturbation(config: Config) -> Perturbation:
    """Return the ascents of the configured method, perhaps none.

    Raises:
        ValueError: options do not go together.
    """
    name = config.optimizer if config.method == "none" else config.method
    method, _ = method_and_options(name)
    if method not in PERTURBATIONS:
        return Perturbation()
    return PERTURBATIONS[method](**_method_options(config, name))


def _ascent_arguments(config: Config) -> dict[str, Any]:
    """Return method, rho and options for an optimizer that supports every method.

    Without a method this is USAM with rho = 0, which takes no ascent.
    """
    ascends = config.method != "none"
    name = config.method if ascends else ef.USAM.method
    rho = config.rho if ascends else 0.0
    return {"method": method_and_options(name)[0], "rho": rho} | _method_options(config, name)


def _hyperparameters(config: Config, make: Callable[..., Any]) -> dict[str, Any]:
    """Return the hyperparameters of the update that a constructor takes."""
    accepted = inspect.signature(make).parameters
    values = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "extrapolation": config.extrapolation,
        "betas": (config.beta1, config.beta2),
    }
    return {name: value for name, value in values.items() if name in accepted}


def _method_options(config: Config, name: str) -> dict[str, Any]:
    """Return the options of a method that the configuration has; 0 stands for no `fd_step`."""
    method, options = method_and_options(name)
    accepted = inspect.signature(PERTURBATIONS[method]).parameters
    values = {key: getattr(config, key) for key in accepted if key in CONFIG_NAMES}
    if not values.get("fd_step", True):
        del values["fd_step"]
    return {**values, **options}


def _wrap_torch_optimizer(config: Config, params: Iterable[nn.Parameter]) -> EigenfilterOptimizer:
    name = config.optimizer.removeprefix(TORCH)
    make = getattr(torch.optim, name, None)
    if not isinstance(make, type) or name in _UNSUPPORTED:
        raise ValueError(f"optimizer: {TORCH}{name} is not an optimizer that train supports")
    base = make(params, **_hyperparameters(config, make))
    return ef.SharpnessAware(base, **_ascent_arguments(config))


def lr_schedule(config: Config, optimizer: EigenfilterOptimizer, steps_per_epoch: int) -> LambdaLR:
    """Return the schedule of lr: a linear warmup, then the configured schedule.

    With T steps in total, W of them warmup, t >= W and s = (t - W) / (T - W), the factor of lr is

        "constant"  1
        "linear"    1 + (end - 1) s
        "cosine"    end + (1 - end) (1 + cos(pi s)) / 2
        "step"      gamma^floor(t / every), where `every` is a number of epochs

    During the warmup, at t < W, the factor is (t + 1) / W.

    Raises:
        ValueError: the warmup is longer than the training, or "step" overflows.
    """
    total = config.epochs * steps_per_epoch
    warm = round(config.warmup * steps_per_epoch)
    if warm > total:
        raise ValueError(
            f"warmup takes {config.warmup:g} epochs, and training has {config.epochs}; lower warmup"
        )
    end, every = config.lr_end, config.lr_every * steps_per_epoch
    after: dict[str, Callable[[int, float], float]] = {
        "constant": lambda t, s: 1.0,
        "linear": lambda t, s: 1.0 + (end - 1.0) * s,
        "cosine": lambda t, s: end + (1.0 - end) * (1.0 + math.cos(math.pi * s)) / 2.0,
        "step": lambda t, s: config.lr_gamma ** (t // every),
    }
    shape = after[config.lr_schedule]
    if config.lr_schedule == "step":
        try:
            shape(total, 1.0)
        except OverflowError:
            raise ValueError(
                f"lr_gamma: {config.lr_gamma:g} makes lr infinite within {config.epochs} epochs; "
                "lower lr_gamma"
            ) from None

    def factor(t: int) -> float:
        if t < warm:
            return (t + 1) / warm
        return shape(t, min((t - warm) / max(total - warm, 1), 1.0))

    return LambdaLR(base_of(optimizer), factor)


def rho_schedule(
    config: Config, optimizer: EigenfilterOptimizer, steps_per_epoch: int
) -> RhoScheduler | None:
    """Return the scheduler of rho, or None if there is no rho or a controller sets it.

    Raises:
        ValueError: rho follows an lr of 0.
    """
    if config.sharpness_target or any(
        rho_key(group) not in group for group in optimizer.param_groups
    ):
        return None
    return RhoScheduler(
        optimizer,
        config.rho_schedule,
        total_steps=config.epochs * steps_per_epoch,
        end=config.rho_end,
        every=config.rho_every,
        gamma=config.rho_gamma,
        start=config.rho_start,
    )


def base_of(optimizer: EigenfilterOptimizer) -> torch.optim.Optimizer:
    """Return the optimizer that applies the update: the wrapped one, or the optimizer itself."""
    return optimizer.base_optimizer if isinstance(optimizer, ef.SharpnessAware) else optimizer
