"""Whole steps of the optimizers, the gradients given: neither model nor backward pass is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import eigenfilter
from eigenfilter.benchmarks import shapes
from eigenfilter.benchmarks.contest import (
    TOLERANCES,
    Benchmark,
    Contender,
    Contest,
    Goal,
    Phase,
    Setting,
    copy,
)
from eigenfilter.benchmarks.peers import torch_adamw, torch_sgd
from eigenfilter.benchmarks.peers.common_sam import FD_STEP, CommonSAM
from eigenfilter.benchmarks.peers.foreach_sam import ForeachSAM
from eigenfilter.benchmarks.shapes import Problem, Shape, give
from eigenfilter.optimizers import EigenfilterOptimizer

LR, MOMENTUM, RHO = 0.01, 0.9, 0.05

HEAVY_BALL = {"lr": LR, "momentum": MOMENTUM}


@dataclass(frozen=True)
class Method:
    """An optimizer of the library and what it is compared with.

    Attributes:
        make: the library's, from parameters and a backend.
        ascents: gradients it takes beside the last.
        accesses: reads and writes of every element that a step has to do.
        name: of its ascents; "" for none.
        base: settings of the peers' base, and its implementations.
    """

    make: Callable[[list[Parameter], str], EigenfilterOptimizer]
    ascents: int
    accesses: int
    name: str = ""
    base: Any = torch_sgd


def _sgd_with(cls: Callable[..., EigenfilterOptimizer], **options: Any) -> Any:
    return lambda params, backend: cls(params, **HEAVY_BALL, backend=backend, **options)


def _adamw(params: list[Parameter], backend: str, rho: float = 0.0) -> EigenfilterOptimizer:
    return eigenfilter.AdamW(params, lr=LR, rho=rho, backend=backend)


# Accesses. Descent: heavy ball reads x, g, m and writes x, m; AdamW reads x, g, m, v and writes x,
# m, v; from a backup they read that in place of x. Ascent: reads x, g and writes x, b. SAM's norm
# reads g; a second ascent reads x, g and writes x; a finite difference has norms of x and g, copies
# g, moves, and then reads b, g, g0 and writes x.
METHODS: Mapping[str, Method] = {
    "sgd": Method(_sgd_with(eigenfilter.SGD), 0, 5),
    "usam": Method(_sgd_with(eigenfilter.USAM, rho=RHO), 1, 9, "usam"),
    "sam": Method(_sgd_with(eigenfilter.SAM, rho=RHO), 1, 10, "sam"),
    "two-step-usam": Method(_sgd_with(eigenfilter.TwoStepUSAM, rho=RHO), 2, 12, "two_step_usam"),
    "hessian-usam": Method(_sgd_with(eigenfilter.HessianUSAM, rho=RHO), 2, 17, "hessian_usam"),
    "adamw": Method(_adamw, 0, 7, base=torch_adamw),
    "adamw-usam": Method(functools.partial(_adamw, rho=RHO), 1, 11, "usam", torch_adamw),
}

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

    def contender(name: str, build: Callable[[list[Parameter]], Any]) -> Contender:
        params = problem.parameters()
        opt = build(params)
        base = getattr(opt, "base_optimizer", opt)
        descend = opt.step if base is opt else opt.descend

        def last() -> None:
            for _ in range(times):
                descend()

        ascents = [opt.ascend] * method.ascents if method.name else []
        return _contender(name, params, gradients, [*ascents, last], base)

    library = contender("eigenfilter", lambda params: method.make(params, setting.backend))
    if method.name:
        peers = (
            contender(
                "common SAM",
                lambda params: CommonSAM(
                    params, method.name, RHO, method.base.CLASS, **method.base.settings(LR)
                ),
            ),
            contender(
                "foreach SAM",
                lambda params: ForeachSAM(params, method.name, RHO, method.base.fused(params, LR)),
            ),
        )
    else:
        peers = (
            contender("torch fused", lambda params: method.base.fused(params, LR)),
            contender("torch foreach", lambda params: method.base.foreach(params, LR)),
        )
    yardstick, copied = copy(problem.elements, problem.dtype, problem.device)
    moved = problem.moved(method.accesses * times)
    return Contest(library, peers, yardstick, moved, copied, TOLERANCES[problem.dtype])


def _contender(
    name: str,
    params: list[Parameter],
    gradients: Sequence[list[Tensor]],
    steps: Sequence[Callable[[], object]],
    holder: torch.optim.Optimizer,
) -> Contender:
    """A contender that gets new gradients before each of its steps."""
    phases = tuple(
        Phase(functools.partial(give, params, given), run)
        for given, run in zip(gradients, steps, strict=True)
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
