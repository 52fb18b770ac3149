"""Whole training steps: forward, backward and the optimizer, in one loop for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import (
    Benchmark,
    Contender,
    Contest,
    Goal,
    Phase,
    Setting,
    Tolerance,
    Yardstick,
    nothing,
)
from benchmarks.methods import LR, METHODS, Make, Method
from benchmarks.networks import NETWORKS, Network

# Losses and weights may differ by this much, absolutely and relatively. The GPT is smooth: the
# roundings of three steps stay roundings. ResNet's ReLUs have kinks, and an activation that falls
# on the other side of one changes the gradient by more than a rounding. So does AdamW, whatever the
# network: it divides by its gradient's size, and of an element that is all rounding, the sign is
# luck. A ReLU network's finite differences are so much luck that they have no row.
SMOOTH, KINKED = 1e-5, 1e-3

PASSES = "gradients + torch fused"
OVERHEAD = {"cpu": 1.08, "cuda": 1.03}  # a USAM step, over its two gradients and one update of SGD

Moves = Callable[[Any], list[Callable[[], object]]]
"""What an optimizer does with each gradient of a step."""

ROWS = {
    "resnet": ("sgd", "usam", "sam", "two-step-usam", "adamw"),
    "gpt": ("sgd", "usam", "sam", "two-step-usam", "hessian-usam", "adamw"),
}


def tolerance(method: str, network: str) -> Tolerance:
    """How closely contenders agree, by name of method and network."""
    size = SMOOTH if network == "gpt" and method != "adamw" else KINKED
    return Tolerance(rtol=size, atol=size)


def train(method: Method, network: Network, setting: Setting, tolerance: Tolerance) -> Contest:
    """Steps on one batch; results are the losses of a step and all that the model holds after it.

    Beside those who take the same steps, the gradients alone are timed: as many as the method
    needs, all at the same point, and one update by torch's fused optimizer.
    """

    def contender(name: str, make: Make, moves: Moves) -> Contender:
        model, inputs, labels = network.build(setting.device)
        each = moves(make(list(model.parameters())))
        losses: list[Tensor] = []

        def step() -> None:
            losses.clear()
            for move in each:
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), labels)
                torch.autograd.backward(loss)
                losses.append(loss.detach())
                move()

        def result() -> list[Tensor]:
            return [*losses, *model.state_dict().values()]

        return Contender(name, (Phase(nothing, step),), result)

    makes, absent = method.contenders(setting)
    library, *peers = (contender(name, make, method.moves) for name, make in makes.items())
    gradients = contender(
        PASSES,
        lambda params: method.base.fused(params, LR),
        lambda opt: [*[nothing] * method.ascents, opt.step],
    )
    yardsticks = (Yardstick(gradients),) if method.ascents else ()
    return Contest(library, tuple(peers), yardsticks, tolerance, absent=absent)


def _benchmark(method: str, network: str) -> Benchmark:
    goals = {
        device: (Goal(PASSES, 1 / most) if method == "usam" else Goal("torch fused", 1.0),)
        for device, most in OVERHEAD.items()
        if method in ("usam", "sgd", "adamw")
    }
    return Benchmark(
        f"train-{network}-{method}",
        f"{method} step with its gradients, {NETWORKS[network].summary}",
        lambda s: train(METHODS[method], NETWORKS[network], s, tolerance(method, network)),
        goals,
    )


BENCHMARKS = tuple(
    _benchmark(method, network) for network, methods in ROWS.items() for method in methods
)
