"""ZeroRedundancyOptimizer, and optimizers that contain others: their step is right, or refused."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from optimizers.distributed_problem import (
    ASCENDING,
    INPUTS,
    PLAIN,
    SETTINGS,
    STEPS,
    WORLD,
    error_message,
    evaluation,
    full,
    network,
    share,
    single,
    single_loss,
    train,
    train_alone,
)
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed


class Partitioned(torch.optim.Optimizer):
    """Every other parameter on each rank, as FairScale's OSS has it."""

    def __init__(self, params: Iterable[Tensor], optimizer_class: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)
        own = self.param_groups[0]["params"][dist.get_rank() :: WORLD]
        self.optim = optimizer_class(own, **defaults)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.optim.step(closure)
        for i, p in enumerate(self.param_groups[0]["params"]):
            dist.broadcast(p.detach(), i % WORLD)
        return loss


def ascend_on_one_ranks_parameters(rank: int) -> dict[str, str]:
    """Construct an ascending optimizer inside one that gives each rank a part."""
    messages = {}
    for outer in (ZeroRedundancyOptimizer, Partitioned):
        for name, (make, settings) in ASCENDING.items():
            params = network().parameters()
            construct = functools.partial(outer, params, optimizer_class=make, **settings)
            messages[f"{outer.__name__} {name}"] = error_message(construct)
    return messages


def test_an_ascent_on_one_ranks_parameters_is_refused(run_distributed: RunDistributed) -> None:
    for messages in run_distributed(ascend_on_one_ranks_parameters, 2):
        assert len(messages) == 2 * len(ASCENDING)
        for name, message in messages.items():
            assert f"SharpnessAware({name.split()[0]}(params, optimizer_class=" in message, name


def ascend_later(rank: int, way: str) -> tuple[str, bool]:
    """Set rho after construction, or add a group with rho then: nothing is written."""
    model = network()
    before = copy.deepcopy(full(model.parameters()))
    opt = ZeroRedundancyOptimizer(list(model[0].parameters()), ef.AdamW, lr=0.05)
    closure = evaluation(opt, model, slice(None))
    if way == "added":
        opt.add_param_group({"params": list(model[2].parameters()), "rho": 0.1})
    else:
        opt.param_groups[0]["rho"] = 0.1 if way != "clip" else 0.0
    if way in ("explicit", "clip"):
        closure()
    act = {"explicit": opt.step, "clip": lambda: opt.optim.clip_grad_norm_(0.1)}
    message = error_message(act.get(way, functools.partial(opt.step, closure)))
    return message, all(map(torch.equal, full(model.parameters()), before))


@pytest.mark.parametrize("way", ["set", "added", "explicit"])
def test_an_ascent_that_is_asked_for_later_is_refused(
    run_distributed: RunDistributed, way: str
) -> None:
    for message, unchanged in run_distributed(ascend_later, 2, way):
        assert "SharpnessAware(ZeroRedundancyOptimizer(params, optimizer_class=" in message
        assert unchanged


def test_clipping_on_one_ranks_parameters_is_refused(run_distributed: RunDistributed) -> None:
    for message, _ in run_distributed(ascend_later, 2, "clip"):
        assert "call torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)" in message


DESCENDING: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (ef.SGD, PLAIN),
    "sgd skipping": (ef.SGD, PLAIN | {"skip_nonfinite": True}),
    "adamw": (ef.AdamW, {"lr": 0.05, "eps": 0.02}),
    "usam at rho 0": (ef.USAM, SETTINGS | {"rho": 0.0}),
}


def take_steps(rank: int, name: str) -> list[Tensor]:
    """Train by an optimizer that does not ascend, inside."""
    make, settings = DESCENDING[name]
    model = DistributedDataParallel(network())
    opt = ZeroRedundancyOptimizer(model.parameters(), make, **settings)
    return train(opt, model, share(rank))


@pytest.mark.parametrize("name", DESCENDING)
def test_a_descent_on_one_ranks_parameters_is_right(
    run_distributed: RunDistributed, name: str
) -> None:
    first, second = run_distributed(take_steps, 2, name)
    if name == "adamw":
        expected = train_alone(lambda params: torch.optim.AdamW(params, lr=0.05, eps=0.02))
    else:
        expected = train_alone(lambda params: torch.optim.SGD(params, **PLAIN))
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))


def ascend_around_one_that_ascends(rank: int) -> str:
    """Wrap an optimizer that could take ascents itself, at rho 0."""
    base = ZeroRedundancyOptimizer(network().parameters(), ef.AdamW, lr=0.05)
    return error_message(functools.partial(ef.SharpnessAware, base, rho=0.15))


def test_an_ascent_around_one_that_ascends_is_refused(run_distributed: RunDistributed) -> None:
    for message in run_distributed(ascend_around_one_that_ascends, 2):
        assert "AdamW takes ascents itself" in message
        assert "wrap an optimizer that takes none" in message


def step_without_parameters(rank: int) -> list[Tensor]:
    """One parameter, so that one rank has none; with a flag that all share."""
    model = DistributedDataParallel(single())
    opt = ZeroRedundancyOptimizer(model.parameters(), ef.SGD, **PLAIN, skip_nonfinite=True)
    for _ in range(STEPS):
        opt.zero_grad()
        single_loss(model, INPUTS[rank : rank + 1]).backward()
        opt.step()
    return full(model.parameters())


def test_a_rank_without_parameters_takes_part(run_distributed: RunDistributed) -> None:
    model = single()
    opt = torch.optim.SGD(model.parameters(), **PLAIN)
    for _ in range(STEPS):
        opt.zero_grad()
        single_loss(model, INPUTS).backward()
        opt.step()
    for result in run_distributed(step_without_parameters, 2):
        torch.testing.assert_close(result, [model.weight.detach()], rtol=1e-12, atol=1e-12)


METHODS: dict[str, dict[str, Any]] = {
    "usam": {},
    "sam": {},
    "two_step_usam": {"ascent": "anchored"},
    "hessian_usam": {"rho": 0.02},
}
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch": (torch.optim.AdamW, {"lr": 0.05, "eps": 0.02}),
    "ours": (ef.SGD, PLAIN),
}


def ascend_around_it(rank: int, method: str, base: str) -> list[Tensor]:
    """Wrap ZeroRedundancyOptimizer of torch's optimizer or of ours."""
    make, settings = BASES[base]
    model = DistributedDataParallel(network())
    inner = ZeroRedundancyOptimizer(model.parameters(), make, **settings)
    opt = ef.SharpnessAware(inner, method, **{"rho": 0.15} | METHODS[method])
    return train(opt, model, share(rank))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_around_it_is_right(
    run_distributed: RunDistributed, method: str, base: str
) -> None:
    first, second = run_distributed(ascend_around_it, 2, method, base)
    make, settings = BASES[base]
    options = {"rho": 0.15} | METHODS[method]
    expected = train_alone(
        lambda params: ef.SharpnessAware(make(params, **settings), method, **options)
    )
    rounding = 1e-7 if method == "hessian_usam" else 1e-12
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


class Composite(torch.optim.Optimizer):
    """Two optimizers, each for a part of the model, the same on every rank."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})
        own = self.param_groups[0]["params"]
        self.matrices = ef.USAM([p for p in own if p.ndim > 1], lr=0.1, rho=0.1)
        self.biases = ef.SGD([p for p in own if p.ndim < 2], lr=0.1)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.matrices.step()
        self.biases.step()


def train_by_parts(model: torch.nn.Module, part: slice) -> list[Tensor]:
    opt = Composite(model.parameters())
    closure = evaluation(opt, model, part)
    for _ in range(STEPS):
        closure()
        while opt.matrices.ascend():
            closure()
        opt.step()
    return full(model.parameters())


def composite(rank: int) -> list[Tensor]:
    return train_by_parts(DistributedDataParallel(network()), share(rank))


def test_an_optimizer_made_of_several_ascends(run_distributed: RunDistributed) -> None:
    """Each has a part of the model, and the same part on every rank."""
    expected = train_by_parts(network(), slice(None))
    for result in run_distributed(composite, 2):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


class Complete(torch.optim.Optimizer):
    """An optimizer that constructs another one of all its parameters."""

    def __init__(self, params: Iterable[Tensor], **defaults: Any) -> None:
        super().__init__(params, defaults)
        self.optim = ef.USAM(self.param_groups[0]["params"], **defaults)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optim.step(closure)


def constructed_within_another(rank: int) -> list[Tensor]:
    model = DistributedDataParallel(network())
    return train(Complete(model.parameters(), **SETTINGS), model, share(rank))


def post_local(rank: int) -> list[Tensor]:
    warnings.filterwarnings("ignore", "When period is 1, no need to use model averaging")
    model = DistributedDataParallel(network())
    own = ef.USAM(model.parameters(), **SETTINGS)
    opt = PostLocalSGDOptimizer(own, PeriodicModelAverager(period=1, warmup_steps=0))
    closure = evaluation(opt, model, share(rank))
    for _ in range(STEPS):
        closure()
        while own.ascend():
            closure()
        opt.step()
    return full(model.parameters())


@pytest.mark.parametrize("scenario", [constructed_within_another, post_local])
def test_optimizers_of_all_parameters_are_not_refused(
    run_distributed: RunDistributed, scenario: Any
) -> None:
    first, second = run_distributed(scenario, 2)
    torch.testing.assert_close(first, train_alone(), rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))
