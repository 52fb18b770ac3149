"""Whole steps of the optimizers from ready gradients: no model and no backward pass is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import shapes
from benchmarks.comparison import (
    TOLERANCES,
    Benchmark,
    Comparison,
    Contender,
    Goal,
    Phase,
    Reference,
    Setting,
    copy_reference,
)
from benchmarks.methods import LR, METHODS, Method, OptimizerFactory
from benchmarks.peers.common_sam import FD_STEP
from benchmarks.shapes import Shape, TensorProblem, set_gradients

MODELS: Mapping[str, tuple[str, Callable[[torch.device], list[Shape]]]] = {
    "resnet18": ("ResNet-18's 62 tensors", lambda device: shapes.resnet18()),
    "resnet50": ("ResNet-50's 161 tensors", lambda device: shapes.resnet50()),
    "vit": ("ViT-B/16's 152 tensors", lambda device: shapes.vit_b16()),
    "gpt2": ("GPT-2's 148 tensors", lambda device: shapes.gpt2()),
    "small": ("2,000 tensors of 256", lambda device: shapes.small()),
    "large": ("4 large tensors", shapes.large),
}


# On a CPU, for 2,000 small tensors: goals of methods that are to be ahead by more than the others.
SMALL_GOALS = {"sgd": 6.0, "usam": 25.0}


def step(method: Method, problem: TensorProblem, setting: Setting, *, times: int = 1) -> Comparison:
    """A step of a method: ascents clear their gradients, the descent does not.

    With `times` > 1, it is so many steps in a row on the same gradients. Such a method has no
    ascents.
    """
    gradients = [problem.tensors(1 + i) for i in range(method.ascents + 1)]
    if method.is_difference:
        torch._foreach_mul_(gradients[1], FD_STEP)
        torch._foreach_add_(gradients[1], gradients[0])

    def contender(name: str, make: OptimizerFactory) -> Contender:
        params = problem.parameters()
        opt = make(params)
        *ascents, descent = method.actions(opt)

        def repeat_descent() -> None:
            for _ in range(times):
                descent()

        state_owner = opt.base_optimizer if hasattr(opt, "base_optimizer") else opt
        return _contender(name, params, gradients, [*ascents, repeat_descent], state_owner)

    factories, absent = method.contenders(setting)
    library, *peers = (contender(name, make) for name, make in factories.items())
    traffic = problem.traffic(method.accesses * times)
    reference = copy_reference(problem.elements, problem.dtype, problem.device, traffic)
    tolerance = TOLERANCES[problem.dtype]
    return Comparison(library, tuple(peers), (reference,), tolerance, traffic, absent=absent)


def _contender(
    name: str,
    params: list[Parameter],
    gradients: Sequence[list[Tensor]],
    actions: Sequence[Callable[[], object]],
    state_owner: torch.optim.Optimizer,
) -> Contender:
    """A contender that gets new gradients before each of its actions."""
    phases = tuple(
        Phase(functools.partial(set_gradients, params, tensors), action)
        for tensors, action in zip(gradients, actions, strict=True)
    )

    def result() -> list[Tensor]:
        """The parameters after each action of one more step, then the optimizer's buffers."""
        points = []
        for phase in phases:
            phase.prepare()
            phase.run()
            points += [p.detach().clone() for p in params]
        keys = ("momentum_buffer", "exp_avg", "exp_avg_sq")
        state = state_owner.state
        buffers = [state[p][key] for p in params for key in keys if key in state[p]]
        return [*points, *buffers]

    return Contender(name, phases, result)


def _goals(method: str, model: str) -> dict[str, tuple[Goal, ...]]:
    small = model == "small"
    if not METHODS[method].ascents:
        return {
            "cpu": (Goal("torch fused", SMALL_GOALS.get(method, 1.0) if small else 1.0),),
            "cuda": (Goal("torch fused", 2.0 if small else 1.0),),
        }
    if small:
        return {
            "cpu": (Goal("common SAM", SMALL_GOALS.get(method, 2.0)),),
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
        lambda s: step(METHODS[method], TensorProblem(shapes_on(s.device), s.device), s),
        _goals(method, model),
    )


def compressed(update: str, problem: TensorProblem, setting: Setting) -> Comparison:
    """A step of bfloat16 weights with masters of 24 bits and states of 8, beside float32's.

    The peer is the same step in plain PyTorch, the references those of float32 tensors.
    """
    method = METHODS[update]
    gradients = [problem.tensors(1)]

    def make(backend: str) -> OptimizerFactory:
        return lambda p: method.make(p, backend, master_weight_bits=24, state_bits=8)

    def contender(name: str, factory: OptimizerFactory, dtype: torch.dtype) -> Contender:
        own = TensorProblem(problem.shapes, problem.device, dtype)
        params, given = own.parameters(), [[g.to(dtype) for g in gradients[0]]]
        opt = factory(params)
        return _contender(name, params, given, method.actions(opt), opt)

    wide = {
        "float32": lambda p: method.make(p, setting.backend),
        "torch fused": lambda p: method.base.fused(p, LR),
    }
    return Comparison(
        contender("eigenfilter", make(setting.backend), problem.dtype),
        (contender("PyTorch", make("reference"), problem.dtype),),
        tuple(Reference(contender(name, of, torch.float32)) for name, of in wide.items()),
        TOLERANCES[problem.dtype],
    )


def _compressed_model(update: str, model: str, setting: Setting) -> Comparison:
    shapes_on = MODELS[model][1]
    problem = TensorProblem(shapes_on(setting.device), setting.device, torch.bfloat16)
    return compressed(update, problem, setting)


BENCHMARKS = (
    *(
        Benchmark(
            f"{update}-compressed-{model}",
            f"{update} step, 24-bit weights and 8-bit state, {MODELS[model][0]}",
            functools.partial(_compressed_model, update, model),
            {"cpu": (Goal("PyTorch", 5.0),), "cuda": (Goal("torch fused", 1.0),)},
        )
        for update in ("sgd", "adamw")
        for model in ("resnet18", "gpt2")
    ),
    *(
        _benchmark(method, model)
        for model in MODELS
        for method in METHODS
        # torch's norm of so many elements is off by 5e-4, and it sets the peers' eps. The library's
        # norm is right to a rounding, so the results would not agree.
        if not (METHODS[method].is_difference and model == "large")
    ),
    Benchmark(
        "sgd-small-warm",
        "ten sgd steps in a row on the same gradients, 2,000 tensors of 256",
        lambda s: step(METHODS["sgd"], TensorProblem(shapes.small(), s.device), s, times=10),
        {"cpu": (Goal("torch fused", 6.0),), "cuda": (Goal("torch fused", 2.0),)},
    ),
)
