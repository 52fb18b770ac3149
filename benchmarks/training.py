"""Whole training steps: forward, backward and the optimizer, in one loop for all contenders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparison import (
    Benchmark,
    Comparison,
    Contender,
    Goal,
    Phase,
    Reference,
    Setting,
    Tolerance,
    do_nothing,
)
from benchmarks.methods import LR, METHODS, Method, OptimizerFactory
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import torch_sgd
from eigenfilter import filters
from eigenfilter.optimizers import registry

# Losses and weights may differ by this much, absolutely and relatively. The GPT is smooth, so the
# roundings of three steps stay roundings. ResNet's ReLUs have kinks: an activation on the other
# side of a kink changes the gradient by more than a rounding. AdamW does so with any network, as it
# divides each element of the gradient by its size: an element that is nothing but rounding gets a
# random sign. Finite differences of a ReLU network depend on rounding so much that they have no
# row.
SMOOTH, KINKED = 1e-5, 1e-3

GRADIENTS = "gradients + torch fused"
OVERHEAD = {"cpu": 1.08, "cuda": 1.03}  # of a USAM step over its two gradients and an SGD update

Actions = Callable[[Any], list[Callable[[], object]]]
"""Returns the calls of an optimizer in one step, one for each gradient."""

_NAMES = [name.replace("_", "-") for name in (*filters.METHODS, *registry.updates())]
_NAMES = [name for name in _NAMES if name in METHODS]
METHODS_BY_NETWORK = {
    "resnet": [name for name in _NAMES if not METHODS[name].is_difference],
    "gpt": _NAMES,
}

GOALS: Mapping[str, Callable[[float], Goal]] = {
    "usam": lambda limit: Goal(GRADIENTS, 1 / limit),
    "sgd": lambda limit: Goal("torch fused", 1.0),
    "adamw": lambda limit: Goal("torch fused", 1.0),
}
"""The goals of some methods, with the largest overhead of an ascent."""


def tolerance(method: str, network: str) -> Tolerance:
    """How closely contenders must agree, by name of method and network."""
    size = SMOOTH if network == "gpt" and METHODS[method].base is torch_sgd else KINKED
    return Tolerance(rtol=size, atol=size)


def train(method: Method, network: Network, setting: Setting, tolerance: Tolerance) -> Comparison:
    """Steps on one batch; the results are the losses of a step and the model's state after it.

    A reference is timed beside the peers: as many gradients as the method needs, all at the same
    point, and one update by torch's fused optimizer.
    """

    def contender(name: str, make: OptimizerFactory, actions: Actions) -> Contender:
        model, inputs, labels = network.build(setting.device)
        calls = actions(make(list(model.parameters())))
        losses: list[Tensor] = []

        def step() -> None:
            losses.clear()
            for call in calls:
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), labels)
                torch.autograd.backward(loss)
                losses.append(loss.detach())
                call()

        def result() -> list[Tensor]:
            return [*losses, *model.state_dict().values()]

        return Contender(name, (Phase(do_nothing, step),), result)

    factories, absent = method.contenders(setting)
    library, *peers = (contender(name, make, method.actions) for name, make in factories.items())
    gradients = contender(
        GRADIENTS,
        lambda params: method.base.fused(params, LR),
        lambda opt: [*[do_nothing] * method.ascents, opt.step],
    )
    references = (Reference(gradients),) if method.ascents else ()
    return Comparison(library, tuple(peers), references, tolerance, absent=absent)


def _benchmark(method: str, network: str) -> Benchmark:
    goals = {
        device: (GOALS[method](limit),) for device, limit in OVERHEAD.items() if method in GOALS
    }
    return Benchmark(
        f"train-{network}-{method}",
        f"{method} step with its gradients, {NETWORKS[network].summary}",
        lambda s: train(METHODS[method], NETWORKS[network], s, tolerance(method, network)),
        goals,
    )


BENCHMARKS = tuple(
    _benchmark(method, network)
    for network, methods in METHODS_BY_NETWORK.items()
    for method in methods
)
