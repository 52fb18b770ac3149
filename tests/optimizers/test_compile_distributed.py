"""Compiled models under DDP and FSDP2, and a checkpoint that is written while training goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from marks import rest_slow
from optimizers.distributed_problem import (
    OPTIMIZERS,
    SETTINGS,
    WORLD,
    Block,
    evaluation,
    full,
    network,
    share,
    train,
    train_alone,
)
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed


def sharded(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def compiled(how: str, counter: Any) -> Any:
    if how == "inside DDP":
        return DistributedDataParallel(torch.compile(Block(network()), backend=counter))
    if how.endswith("around DDP"):
        return torch.compile(DistributedDataParallel(Block(network())), backend=counter)
    blocks = nn.Sequential(*map(Block, network()))
    for block in blocks:  # in place, before it is sharded, as torchtitan does
        block.compile(backend=counter)
    return sharded(blocks)


def train_compiled(rank: int, how: str, name: str) -> list[Tensor]:
    torch.compiler.reset()
    # The compiler itself reads the grad of tensors that are no leaves.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    counter = CompileCounterWithBackend("inductor" if how.startswith("inductor") else "aot_eager")
    model = compiled(how, counter)
    params = train(OPTIMIZERS[name](model.parameters()), model, share(rank))
    assert counter.frame_count > 0
    return params


HOW = ["inside DDP", "around DDP", "blocks under FSDP2", "inductor, around DDP"]


@pytest.mark.parametrize("name", rest_slow(["sam", "sequential"]))
@pytest.mark.parametrize("how", rest_slow(HOW, *HOW[:3]))
def test_the_single_processs_run(run_distributed: RunDistributed, how: str, name: str) -> None:
    first, second = run_distributed(train_compiled, 2, how, name)
    torch.testing.assert_close(first, train_alone(OPTIMIZERS[name]), rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))


def save_while_training(rank: int, folder: str) -> dict[str, list[Tensor]]:
    """The checkpoint holds x and the state of the moment in which saving began."""
    model = sharded(network())
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    for _ in range(2):
        opt.step(closure)
    expected = full(model.parameters())
    momenta = full(state["momentum_buffer"] for state in opt.state.values())
    weights, state = get_state_dict(model, opt)
    group = dist.new_group(backend="gloo")  # of its own, as async_save asks for
    values = {"model": weights, "opt": state}
    future: Any = dcp.async_save(values, checkpoint_id=folder, process_group=group)
    for _ in range(2):
        opt.step(closure)
    future.result()
    dist.destroy_process_group(group)
    later = full(model.parameters())
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "opt": state}, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
    loaded = full(model.parameters())
    restored = full(state["momentum_buffer"] for state in opt.state.values())
    for _ in range(2):
        opt.step(closure)
    return {
        "saved": [*expected, *momenta],
        "loaded": [*loaded, *restored],
        "later": later,
        "again": full(model.parameters()),
    }


def test_a_checkpoint_written_meanwhile(run_distributed: RunDistributed, tmp_path: Path) -> None:
    for result in run_distributed(save_while_training, 2, str(tmp_path)):
        assert all(map(torch.equal, result["loaded"], result["saved"]))
        assert all(map(torch.equal, result["again"], result["later"]))
        assert not any(map(torch.equal, result["later"], result["saved"]))
