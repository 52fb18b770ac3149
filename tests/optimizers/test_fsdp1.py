"""FSDP1, whose flat shards are no DTensors: each step is that of the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

import eigenfilter as ef
from optimizers.distributed_problem import (
    INPUTS,
    OPTIMIZERS,
    PLAIN,
    SETTINGS,
    STEPS,
    WORLD,
    assert_flat,
    batch,
    evaluation,
    flattened,
    full_weight,
    network,
    share,
    single,
    single_loss,
    train,
    train_alone,
)
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

with_original_or_flat_parameters = pytest.mark.parametrize("original", [False, True])

# What needs no norm, and is right on shards of any kind.
ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "usam": OPTIMIZERS["usam"],
    "sequential": OPTIMIZERS["sequential"],
    "anchored": OPTIMIZERS["anchored"],
    "adamw": lambda params: ef.AdamW(params, lr=0.05, eps=0.02, rho=0.15),
    "wrapper": OPTIMIZERS["wrapper"],
}


def train_elementwise(rank: int, name: str, original: bool) -> Tensor:
    model = flattened(original)
    train(ELEMENTWISE[name](model.parameters()), model, share(rank))
    return full_weight(model)


@with_original_or_flat_parameters
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_flat_shards_without_a_norm(
    run_distributed: RunDistributed, name: str, original: bool
) -> None:
    first, second = run_distributed(train_elementwise, 2, name, original)
    assert_flat(first, train_alone(ELEMENTWISE[name]))
    assert torch.equal(first, second)


def train_nested(rank: int, original: bool) -> Tensor:
    """A flat parameter for each layer, under a whole that has none."""
    model = network()
    for i in (0, 2):
        model[i] = flattened(original, model[i])
    whole = flattened(original, model)
    train(ELEMENTWISE["sequential"](whole.parameters()), whole, share(rank))
    return full_weight(whole)


@with_original_or_flat_parameters
def test_several_flat_parameters(run_distributed: RunDistributed, original: bool) -> None:
    for result in run_distributed(train_nested, 2, original):
        assert_flat(result, train_alone(OPTIMIZERS["sequential"]))


def run_forward_before_the_ascent(rank: int, original: bool, strategy: ShardingStrategy) -> Tensor:
    """A forward pass alone leaves parameters gathered: after an ascent these copies are stale."""
    model = network()
    model[0] = flattened(original, model[0], sharding_strategy=strategy)
    whole = flattened(original, model, sharding_strategy=strategy)
    opt = ef.USAM(whole.parameters(), **SETTINGS)
    closure = evaluation(opt, whole, share(rank))
    inputs, _ = batch(share(rank))
    for _ in range(STEPS):
        closure()
        whole(inputs)
        while opt.ascend():
            closure()
        with torch.no_grad():
            whole(inputs)
        opt.step()
    return full_weight(whole)


@with_original_or_flat_parameters
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_flat_parameters_that_were_left_gathered(
    run_distributed: RunDistributed, strategy: str, original: bool
) -> None:
    """Elements of all parameters, in whatever order the flat ones hold them."""
    expected = torch.cat([p.flatten() for p in train_alone()]).sort().values
    sharding = ShardingStrategy[strategy]
    for result in run_distributed(run_forward_before_the_ascent, 2, original, sharding):
        actual = result[result != 0].sort().values  # without padding
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def restore(rank: int, original: bool) -> bool:
    """x comes back bit for bit, and the loss there with it."""
    model = flattened(original)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    before, loss = full_weight(model), closure().item()
    opt.ascend()
    inputs, targets = batch(share(rank))
    with torch.no_grad():
        perturbed = (model(inputs) - targets).square().mean().item()
    opt.restore()
    again = closure().item()
    return torch.equal(full_weight(model), before) and loss == again != perturbed


@with_original_or_flat_parameters
def test_flat_shards_are_restored(run_distributed: RunDistributed, original: bool) -> None:
    assert run_distributed(restore, 2, original) == [True, True]


def train_and_clip(model: nn.Module, part: slice) -> Tensor:
    """The norms that clipping sees in each step of SAM."""
    opt = ef.SAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, part)
    norms = []
    for _ in range(STEPS):
        opt.zero_grad()
        closure()
        opt.ascend()
        closure()
        norms.append(opt.clip_grad_norm_(1e9))
        opt.step()
    return torch.stack(norms)


def train_whole(rank: int, original: bool) -> tuple[Tensor, Tensor]:
    """Flat parameters that FSDP1 does not shard: every rank has the whole norm."""
    warnings.filterwarnings("ignore", "The `NO_SHARD` sharding strategy is deprecated")
    model = flattened(original, sharding_strategy=ShardingStrategy.NO_SHARD)
    norms = train_and_clip(model, share(rank))
    return full_weight(model), norms


@with_original_or_flat_parameters
def test_a_norm_over_flat_parameters_that_every_rank_has_whole(
    run_distributed: RunDistributed, original: bool
) -> None:
    model = network()
    norms = train_and_clip(model, slice(None))
    for actual, total in run_distributed(train_whole, 2, original):
        assert_flat(actual, model.parameters())
        torch.testing.assert_close(total, norms, rtol=1e-12, atol=0.0)


def train_in_groups_of_one(rank: int, original: bool) -> Tensor:
    """Each rank shards a model of its own, over itself alone."""
    warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")
    own = [dist.new_group([r]) for r in range(WORLD)][rank]
    model = flattened(original, process_group=own)
    train(ef.SAM(model.parameters(), **SETTINGS), model, slice(None))
    return full_weight(model)


@with_original_or_flat_parameters
def test_flat_parameters_of_one_rank_alone(run_distributed: RunDistributed, original: bool) -> None:
    for actual in run_distributed(train_in_groups_of_one, 2, original):
        assert_flat(actual, train_alone(OPTIMIZERS["sam"]))


def train_single(model: nn.Module, inputs: Tensor) -> None:
    """Step in both forms."""
    opt = ef.TwoStepUSAM(model.parameters(), **SETTINGS, skip_nonfinite=True)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = single_loss(model, inputs)
        loss.backward()
        return loss

    opt.step(closure)
    closure()
    while opt.ascend():
        closure()
    opt.step()


def train_without_elements(rank: int, original: bool) -> Tensor:
    """One rank has nothing of the parameter, nor of its gradient; with a flag that all share."""
    model = flattened(original, single())
    train_single(model, INPUTS[rank : rank + 1])
    return full_weight(model)


@with_original_or_flat_parameters
def test_a_rank_without_elements_takes_part(
    run_distributed: RunDistributed, original: bool
) -> None:
    model = single()
    train_single(model, INPUTS)
    for result in run_distributed(train_without_elements, 2, original):
        assert_flat(result, [model.weight])


def groups(model: nn.Module, first: float, others: float) -> list[dict[str, Any]]:
    """Two groups, of which one rank holds next to nothing of the first or of the second."""
    params = list(model.parameters())
    return [{"params": params[:1], "rho": first}, {"params": params[1:], "rho": others}]


def train_groups(rank: int, first: float, others: float) -> Tensor:
    """Groups that do not ascend: a rank with gradients of these alone takes part all the same."""
    model = flattened(True)
    opt = ef.USAM(groups(model, first, others), **PLAIN, skip_nonfinite=True)
    train(opt, model, share(rank))
    return full_weight(model)


@pytest.mark.parametrize(("first", "others"), [(0.15, 0.0), (0.0, 0.15)])
def test_a_rank_without_gradients_that_ascend_takes_part(
    run_distributed: RunDistributed, first: float, others: float
) -> None:
    model = network()
    expected = train(ef.USAM(groups(model, first, others), **PLAIN), model, slice(None))
    for result in run_distributed(train_groups, 2, first, others):
        assert_flat(result, expected)
