"""Whole steps of the optimizers, the gradients given: neither model nor backward pass is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

import eigenfilter
from benchmarks import shapes
from benchmarks.contest import TOLERANCES, Benchmark, Contender, Contest, Goal, Phase, Setting, copy
from benchmarks.peers import torch_sgd
from benchmarks.peers.common_sam import CommonUSAM
from benchmarks.shapes import Problem, give

LR, MOMENTUM, RHO = 0.01, 0.9, 0.05

# Accesses to every element. USAM: the ascent reads x, g and writes x, b; the descent reads b, g, m
# and writes x, m. Heavy ball: it reads x, g, m and writes x, m.
USAM_ACCESSES = 9
HEAVY_BALL_ACCESSES = 5


def usam(problem: Problem, setting: Setting) -> Contest:
    """USAM's step: both clear the ascent's gradients and leave the descent's where they are."""
    gradients = problem.tensors(1), problem.tensors(2)
    params = problem.parameters()
    opt = eigenfilter.USAM(params, LR, MOMENTUM, rho=RHO, backend=setting.backend)
    library = _contender("eigenfilter", params, gradients, (opt.ascend, opt.step), opt)
    params = problem.parameters()
    common = CommonUSAM(params, rho=RHO, lr=LR, momentum=MOMENTUM)
    steps = common.first_step, common.second_step
    peer = _contender("common SAM", params, gradients, steps, common.base_optimizer)
    return _contest(problem, library, (peer,), USAM_ACCESSES)


def heavy_ball(problem: Problem, setting: Setting, *, steps: int = 1) -> Contest:
    """SGD's step with momentum; with `steps` > 1, that many in a row on the same gradients."""
    gradients = (problem.tensors(1),)

    def contender(
        name: str, make: Callable[[Sequence[Parameter]], torch.optim.Optimizer]
    ) -> Contender:
        params = problem.parameters()
        opt = make(params)

        def run() -> None:
            for _ in range(steps):
                opt.step()

        return _contender(name, params, gradients, (run,), opt)

    return _contest(
        problem,
        contender(
            "eigenfilter",
            lambda params: eigenfilter.SGD(params, LR, MOMENTUM, backend=setting.backend),
        ),
        (
            contender("torch fused", lambda params: torch_sgd.fused(params, LR, MOMENTUM)),
            contender("torch foreach", lambda params: torch_sgd.foreach(params, LR, MOMENTUM)),
        ),
        HEAVY_BALL_ACCESSES * steps,
    )


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
        return [*params, *(holder.state[p]["momentum_buffer"] for p in params)]

    return Contender(name, phases, result)


def _contest(
    problem: Problem, library: Contender, peers: tuple[Contender, ...], accesses: int
) -> Contest:
    yardstick, copied = copy(problem.elements, problem.dtype, problem.device)
    return Contest(
        library, peers, yardstick, problem.moved(accesses), copied, TOLERANCES[problem.dtype]
    )


BENCHMARKS = (
    Benchmark(
        "usam-resnet18",
        "USAM step, ResNet-18's 62 tensors",
        lambda s: usam(Problem(shapes.resnet18(), s.device), s),
        {"cpu": (Goal("common SAM", 3.0),)},
    ),
    Benchmark(
        "usam-small",
        "USAM step, 2,000 tensors of 256",
        lambda s: usam(Problem(shapes.small(), s.device), s),
        {"cpu": (Goal("common SAM", 25.0),), "cuda": (Goal("common SAM", 15.0),)},
    ),
    Benchmark(
        "usam-large",
        "USAM step, 4 large tensors",
        lambda s: usam(Problem(shapes.large(s.device), s.device), s),
        {"cpu": (Goal("copy", 1 / 1.15),)},
    ),
    Benchmark(
        "sgd-small",
        "heavy-ball step, 2,000 tensors of 256",
        lambda s: heavy_ball(Problem(shapes.small(), s.device), s),
        {"cpu": (Goal("torch fused", 6.0),), "cuda": (Goal("torch fused", 2.0),)},
    ),
    Benchmark(
        "sgd-small-warm",
        "ten heavy-ball steps in a row on the same gradients, 2,000 tensors of 256",
        lambda s: heavy_ball(Problem(shapes.small(), s.device), s, steps=10),
        {"cpu": (Goal("torch fused", 6.0),), "cuda": (Goal("torch fused", 2.0),)},
    ),
    Benchmark(
        "sgd-large",
        "heavy-ball step, 4 large tensors",
        lambda s: heavy_ball(Problem(shapes.large(s.device), s.device), s),
        {"cpu": (Goal("torch fused", 1.0),), "cuda": (Goal("torch fused", 1.0),)},
    ),
)
