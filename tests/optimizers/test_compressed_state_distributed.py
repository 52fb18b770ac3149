"""Compressed states under DDP, FSDP2 and distributed checkpoints.

All processes take the same batch, and the shards are whole groups of codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from optimizers.distributed_problem import WORLD, error_message, full
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

STEPS = 4
SMALLEST: dict[str, Any] = {"master_weight_bits": 24, "state_bits": 8}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "heavy ball": lambda params, **kw: ef.SGD(params, lr=0.1, momentum=0.9, **kw),
    "msam": lambda params, **kw: ef.MSAM(params, lr=0.1, momentum=0.9, rho=0.05, **kw),
    "usam": lambda params, **kw: ef.USAM(params, lr=0.1, momentum=0.9, rho=0.05, **kw),
    "adamw": lambda params, **kw: ef.AdamW(params, lr=0.02, **kw),
    "adamw usam": lambda params, **kw: ef.AdamW(params, lr=0.02, rho=0.05, **kw),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(64, 8, bias=False), nn.Tanh(), nn.Linear(8, 64, bias=False)
    return nn.Sequential(*layers).bfloat16()


def sharded() -> nn.Sequential:
    model = network()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(opt: Any, model: nn.Module, steps: int = STEPS) -> None:
    inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)


def result(opt: Any, model: nn.Module) -> list[Tensor]:
    """Whole master weights, and states as numbers."""
    states = [
        state[key]
        for _, state in sorted(opt.state_dict()["state"].items())
        for key in sorted(set(state) - {"step", "weight_correction"})
    ]
    return full([*opt.master_weights(), *states])


def alone(name: str) -> list[Tensor]:
    model = network()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(opt, model)
    return result(opt, model)


def under_ddp(rank: int, name: str) -> list[Tensor]:
    model = DistributedDataParallel(network())
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(opt, model)
    return result(opt, model)


def under_fsdp(rank: int, name: str) -> list[Tensor]:
    model = sharded()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(opt, model)
    return result(opt, model)


def through_a_checkpoint(rank: int, name: str) -> list[Tensor]:
    """Saved half way by torch.distributed.checkpoint, and loaded by another optimizer."""
    model = sharded()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(opt, model, STEPS // 2)
    opt.zero_grad()
    saved = checkpoint.get_optimizer_state_dict(model, opt)
    other = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    checkpoint.set_optimizer_state_dict(model, other, saved)
    train(other, model, STEPS - STEPS // 2)
    return result(other, model)


def through_compressed_state(rank: int, name: str) -> list[Tensor]:
    model = sharded()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(opt, model, STEPS // 2)
    saved = opt.compressed_state_dict()
    assert all(
        t.dtype in (torch.int8, torch.uint8, torch.float32)
        for state in saved["state"].values()
        for t in state.values()
    )
    other = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    other.load_state_dict(saved)
    train(other, model, STEPS - STEPS // 2)
    return result(other, model)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ddp_is_the_single_processs_run(run_distributed: RunDistributed, name: str) -> None:
    for got in run_distributed(under_ddp, WORLD, name):
        assert_same(got, alone(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fsdp2_is_the_single_processs_run(run_distributed: RunDistributed, name: str) -> None:
    """But for codes, which are rounded up or down by the number of an element in its shard.

    A step of them is at most 1.6% of the largest one of its group.
    """
    for got in run_distributed(under_fsdp, WORLD, name):
        for a, b in zip(got, alone(name), strict=True):
            assert a.dtype == b.dtype
            assert (a - b).abs().max() <= STEPS * 0.016 * b.abs().max()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scenario", [through_a_checkpoint, through_compressed_state])
def test_a_checkpoint_of_shards_goes_on(
    run_distributed: RunDistributed, scenario: Any, name: str
) -> None:
    expected = run_distributed(under_fsdp, WORLD, name)
    for got, wanted in zip(run_distributed(scenario, WORLD, name), expected, strict=True):
        assert_same(got, wanted)


def load_scales_of_another_sharding(rank: int) -> str:
    alone, model = network(), sharded()
    opt = OPTIMIZERS["heavy ball"](alone.parameters(), **SMALLEST)
    train(opt, alone)
    saved = opt.compressed_state_dict()
    other = OPTIMIZERS["heavy ball"](model.parameters(), **SMALLEST)
    return error_message(lambda: other.load_state_dict(saved))


def test_codes_of_another_sharding_are_refused(run_distributed: RunDistributed) -> None:
    for message in run_distributed(load_scales_of_another_sharding, WORLD):
        assert "state_dict()" in message
