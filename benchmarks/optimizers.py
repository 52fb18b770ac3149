"""Whole steps of the optimizers, the gradients given: neither model nor backward pass is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import shapes
from benchmarks.contest import (
    TOLERANCES,
    Benchmark,
    Contender,
    Contest,
    Goal,
    Phase,
    Setting,
    copy,
)
from benchmarks.methods import METHODS, Make, Method
from benchmarks.peers.common_sam import FD_STEP
from benchmarks.shapes import Problem, Shape, give

MODELS: Mapping[str, tuple[str, Callable[[torch.device], list[Shape]]]] = {
    "resnet18": ("ResNet-18's 62 tensors", lambda device: shapes.resnet18()),
    "resnet50": ("ResNet-50's 161 tensors", lambda device: shapes.resnet50()),
    "vit": ("ViT-B/16's 152 tensors", lambda device: shapes.vit_b16()),
    "gpt2": ("GPT-2's 148 tensors", lambda device: shapes.gpt2()),
    "small": ("2,000 tensors of 256", lambda device: shapes.small()),
    "large": ("4 large tensors", shapes.large),
}


def step(method: Method, problem: Problem, setting: Setting, *, times: int = 1) -> Contest:
    """A step: ascents clear their gradients, the descent leaves its own where they are.

    With `times` > 1, so many in a row on the same gradients (only without ascents).
    """
    gradients = [problem.tensors(1 + i) for i in range(method.ascents + 1)]
    if method.name == "hessian_usam":  # the two sides of a finite difference are nearly equal
        torch._foreach_mul_(gradients[1], FD_STEP)
        torch._foreach_add_(gradients[1], gradients[0])

    def contender(name: str, make: Make) -> Contender:
        params = problem.parameters()
        opt = make(params)
        *ascents, descend = method.moves(opt)

        def last() -> None:
            for _ in range(times):
                descend()

        holder = opt.base_optimizer if hasattr(opt, "base_optimizer") else opt
        return _contender(name, params, gradients, [*ascents, last], holder)

    makes, absent = method.contenders(setting)
    library, *peers = (contender(name, make) for name, make in makes.items())
    moved = problem.moved(method.accesses * times)
    yardstick = copy(problem.elements, problem.dtype, problem.device, moved)
    tolerance = TOLERANCES[problem.dtype]
    return Contest(library, tuple(peers), (yardstick,), tolerance, moved, absent=absent)


def _contender(
    name: str,
    params: list[Parameter],
    gradients: Sequence[list[Tensor]],
    moves: Sequence[Callable[[], object]],
    holder: torch.optim.Optimizer,
) -> Contender:
    """A contender that gets new gradients before each of its moves."""
    phases = tuple(
        Phase(functools.partial(give, params, given), move)
        for given, move in zip(gradients, moves, strict=True)
    )

    def result() -> list[Tensor]:
        """Every point of one more step, then parameters and buffers."""
        points = []
        for phase in phases:
            phase.prepare()
            phase.run()
            points += [p.detach().clone() for p in params]
        buffers = ("momentum_buffer", "exp_avg", "exp_avg_sq")
        kept = [holder.state[p][key] for p in params for key in buffers if key in holder.state[p]]
        return [*points, *kept]

    return Contender(name, phases, result)


def _goals(method: str, model: str) -> dict[str, tuple[Goal, ...]]:
    if method in ("sgd", "adamw"):
        small = model == "small"
        return {
            "cpu": (Goal("torch fused", 6.0 if small and method == "sgd" else 1.0),),
            "cuda": (Goal("torch fused", 2.0 if small else 1.0),),
        }
    if model == "small":
        return {
            "cpu": (Goal("common SAM", 25.0 if method == "usam" else 2.0),),
            "cuda": (Goal("common SAM", 15.0),),
        }
    if model == "large":
        return {"cpu": (Goal("copy", 1 / 1.15),)}
    return {"cpu": (Goal("common SAM", 3.0 if model == "resnet18" else 2.0),)}


def _benchmark(method: str, model: str) -> Benchmark:
    summary, shapes_on = MODELS[model]
    return Benchmark(
        f"{method}-{model}",
        f"{method} step, {summary}",
        lambda s: step(METHODS[method], Problem(shapes_on(s.device), s.device), s),
        _goals(method, model),
    )


BENCHMARKS = (
    *(
        _benchmark(method, model)
        for model in MODELS
        for method in METHODS
        # Of so many elements torch's norm, which sets the peers' eps, is off by 5e-4: they and the
        # library, which is right to a rounding, do not agree.
        if (method, model) != ("hessian-usam", "large")
    ),
    Benchmark(
        "sgd-small-warm",
        "ten sgd steps in a row on the same gradients, 2,000 tensors of 256",
        lambda s: step(METHODS["sgd"], Problem(shapes.small(), s.device), s, times=10),
        {"cpu": (Goal("torch fused", 6.0),), "cuda": (Goal("torch fused", 2.0),)},
    ),
)
