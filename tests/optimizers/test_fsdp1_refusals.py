"""FSDP1: steps that all ranks skip together, and steps that would be wrong and are refused."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import eigenfilter as ef
from optimizers.distributed_problem import (
    ASCENDING,
    PLAIN,
    SETTINGS,
    assert_flat,
    batch,
    descent_norm_alone,
    error_message,
    evaluation,
    flattened,
    full_weight,
    network,
    share,
)
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

with_original_or_flat_parameters = pytest.mark.parametrize("original", [False, True])


def spoil(model: nn.Module) -> None:
    """Make an element of this rank's gradient infinite."""
    next(p for p in model.parameters() if p.numel() > 3).grad.view(-1)[3] = torch.inf


def skip_by_one_shard(rank: int, original: bool) -> list[tuple[int, bool]]:
    """The element that is not finite lies in one rank's shard: all skip."""
    model = flattened(original)
    opt = ef.USAM(model.parameters(), **SETTINGS, skip_nonfinite=True)
    closure = evaluation(opt, model, share(rank))
    before, results = full_weight(model), []
    for spoiled in ("ascent", "descent", "neither"):
        for phase in ("ascent", "descent"):
            closure()
            if phase == spoiled and rank == 0:
                spoil(model)
            opt.ascend() if phase == "ascent" else opt.step()
        results.append((opt.skipped, torch.equal(full_weight(model), before)))
    return results


@with_original_or_flat_parameters
def test_flat_shards_skip_together(run_distributed: RunDistributed, original: bool) -> None:
    for results in run_distributed(skip_by_one_shard, 2, original):
        assert results == [(1, True), (2, True), (2, False)]


def scale_losses(rank: int, original: bool) -> tuple[int, float, Tensor]:
    """A step that one rank's gradient stops, and one that none does."""
    model, scaler = flattened(original), ShardedGradScaler("cpu", init_scale=64.0)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    inputs, targets = batch(share(rank))
    for spoiled in (True, False):
        for phase in ("ascent", "descent"):
            opt.zero_grad()
            scaler.scale((model(inputs) - targets).square().mean()).backward()
            if phase == "ascent":
                opt.ascend(grad_scaler=scaler)
                continue
            if spoiled and rank == 0:
                spoil(model)
            scaler.unscale_(opt)
            scaler.step(opt)
        scaler.update()
    return opt.skipped, scaler.get_scale(), full_weight(model)


@with_original_or_flat_parameters
def test_a_sharded_scaler_stops_every_rank(run_distributed: RunDistributed, original: bool) -> None:
    model = network()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    opt.step(evaluation(opt, model, slice(None)))
    for skipped, scale, params in run_distributed(scale_losses, 2, original):
        assert (skipped, scale) == (1, 32.0)
        assert_flat(params, model.parameters())


def scale_losses_of_one_shard(rank: int, kind: type[torch.amp.GradScaler]) -> str:
    """A scaler that looks at one shard alone, in the ascent or in the descent."""
    inputs, targets = batch(share(rank))
    model, scaler = flattened(True), kind("cpu", init_scale=64.0)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    before = full_weight(model)

    def backward() -> None:
        opt.zero_grad()
        scaler.scale((model(inputs) - targets).square().mean()).backward()

    backward()
    message = error_message(functools.partial(opt.ascend, grad_scaler=scaler))
    if not message:
        backward()
        message = error_message(functools.partial(scaler.step, opt))
        opt.restore()
    assert torch.equal(full_weight(model), before)
    return message


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (
            torch.amp.GradScaler,
            "use torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler",
        ),
        (ShardedGradScaler, "call scaler.unscale_(opt)"),
    ],
)
def test_a_scaler_of_one_rank_is_refused(
    run_distributed: RunDistributed, kind: Any, remedy: str
) -> None:
    for message in run_distributed(scale_losses_of_one_shard, 2, kind):
        assert remedy in message


def take_norms(rank: int, original: bool) -> dict[str, str]:
    """Construct what takes a norm, or set rho later."""
    messages = {}
    model = flattened(original)
    for name in ("sam", "asam", "difference", "adamw sam"):
        make, settings = ASCENDING[name]
        messages[name] = error_message(functools.partial(make, model.parameters(), **settings))
    base = torch.optim.SGD(model.parameters(), **PLAIN)
    messages["wrapper"] = error_message(functools.partial(ef.SharpnessAware, base, "sam"))
    messages["msam"] = error_message(functools.partial(ef.MSAM, model.parameters(), rho=0.1))
    opt = ef.SAM(model.parameters(), **SETTINGS | {"rho": 0.0})
    opt.param_groups[0]["rho"] = 0.1
    before = full_weight(model)
    closure = evaluation(opt, model, share(rank))
    messages["later"] = error_message(functools.partial(opt.step, closure))
    assert torch.equal(full_weight(model), before)
    return messages


@with_original_or_flat_parameters
def test_a_norm_over_flat_shards_is_refused(
    run_distributed: RunDistributed, original: bool
) -> None:
    for messages in run_distributed(take_norms, 2, original):
        assert len(messages) == 7
        for name, message in messages.items():
            assert "torch.distributed.fsdp.fully_shard" in message, name
            other = "SGD(extrapolation=...)" if name == "msam" else "USAM or TwoStepUSAM"
            assert f"or use {other}, which need" in message, name


def hide_handles(rank: int, original: bool) -> dict[str, str]:
    """gc.freeze() hides what handles the flat parameters."""
    messages = {}
    model = flattened(original)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    gc.freeze()
    try:
        before = [p.detach().clone() for p in model.parameters()]
        messages["step"] = error_message(functools.partial(opt.step, closure))
        make = functools.partial(ef.SAM, model.parameters(), **SETTINGS)
        messages["construct"] = error_message(make)
        assert all(map(torch.equal, before, model.parameters()))
    finally:
        gc.unfreeze()
    opt.step(closure)
    gc.freeze()  # once they are known it does not matter
    try:
        opt.step(closure)
    finally:
        gc.unfreeze()
    return messages


@with_original_or_flat_parameters
def test_flat_shards_whose_handles_are_hidden_are_refused(
    run_distributed: RunDistributed, original: bool
) -> None:
    for messages in run_distributed(hide_handles, 2, original):
        assert len(messages) == 2
        for name, message in messages.items():
            assert "call gc.unfreeze() before" in message, name


def clip(rank: int, original: bool) -> tuple[str, float]:
    """Our clipping is refused; the module's own clips the descent's gradient."""
    model = flattened(original, network().float())
    opt = ef.USAM(model.parameters(), **SETTINGS)
    inputs, targets = (t.float() for t in batch(share(rank)))
    for _ in range(2):
        opt.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        opt.ascend()
    message = error_message(functools.partial(opt.clip_grad_norm_, 0.125))
    total = model.clip_grad_norm_(0.125).item()
    opt.step()
    return message, total


@with_original_or_flat_parameters
def test_clipping_flat_shards_is_their_modules_affair(
    run_distributed: RunDistributed, original: bool
) -> None:
    for message, total in run_distributed(clip, 2, original):
        assert "call model.clip_grad_norm_(max_norm)" in message
        assert total == pytest.approx(descent_norm_alone(), rel=1e-4)


def ascend_without_synchronization(rank: int, original: bool) -> str:
    """Gradients from no_sync() are whole, and the parameters are shards."""
    model = flattened(original)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    with model.no_sync():
        evaluation(opt, model, share(rank))()
    message = error_message(opt.ascend)
    assert not opt.perturbed
    return message


@with_original_or_flat_parameters
def test_gradients_that_were_not_synchronized_are_refused(
    run_distributed: RunDistributed, original: bool
) -> None:
    for message in run_distributed(ascend_without_synchronization, 2, original):
        assert "shape" in message
        assert not original or "ascend and step by synchronized ones" in message
