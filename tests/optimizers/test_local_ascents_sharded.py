"""`ascent_sync` under FSDP2: replicas of two shards each; and what it refuses."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from eigenfilter._distributed import fsdp_groups
from optimizers.distributed_problem import (
    OPTIMIZERS,
    SETTINGS,
    Block,
    batch,
    error_message,
    evaluation,
    flattened,
    full,
    network,
)
from optimizers.test_local_ascents import take_steps, train_each_part
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

WORLD = 4
HALVES = [slice(0, 4), slice(4, 8)]  # what the two replicas train on


def quarter(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    """Shard a model as HSDP does: two replicas of two shards, a group for each layer."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def hybrid(**options: Any) -> nn.Sequential:
    return shard(network(), **options)


def train_hybrid(rank: int, name: str, local: bool, form: str) -> list[Tensor]:
    model = hybrid()
    opt = OPTIMIZERS[name](model.parameters())
    if local:
        ef.ascent_sync(model, opt, enabled=False)
    take_steps(form, opt, evaluation(opt, model, quarter(rank)))
    return full(model.parameters())


def assert_alike(results: list[list[Tensor]], expected: list[Tensor], rounding: float) -> None:
    for result in results:
        assert all(map(torch.equal, result, results[0]))
    torch.testing.assert_close(results[0], expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replicas_of_shards(run_distributed: RunDistributed, name: str, local: bool) -> None:
    """Whole ascents are those of one process, local ones those of a process for each replica."""
    results = run_distributed(train_hybrid, WORLD, name, local, "closure")
    rounding = 1e-7 if name == "difference" else 1e-12
    assert_alike(results, train_each_part(name, HALVES if local else [slice(None)]), rounding)


def train_released(rank: int, local: bool) -> list[list[Tensor]]:
    runs = []
    for release in (False, True):
        model = hybrid()
        opt = ef.TwoStepUSAM(model.parameters(), **SETTINGS, release_gradients=release)
        if local:
            ef.ascent_sync(model, opt, enabled=False)
        take_steps("closure", opt, evaluation(opt, model, quarter(rank)))
        runs.append(full(model.parameters()))
    return runs


@pytest.mark.parametrize("local", [False, True])
def test_ascents_that_backward_takes(run_distributed: RunDistributed, local: bool) -> None:
    for whole, each in run_distributed(train_released, WORLD, local):
        assert all(map(torch.equal, whole, each))


def test_the_explicit_form(run_distributed: RunDistributed) -> None:
    results = run_distributed(train_hybrid, WORLD, "sam", True, "explicit")
    assert_alike(results, train_each_part("sam", HALVES), 1e-12)


def train_compiled(rank: int) -> list[Tensor]:
    torch.compiler.reset()
    # The compiler itself reads the grad of tensors that are no leaves.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    model, counter = nn.Sequential(*map(Block, network())), CompileCounter()
    for block in model:
        block.compile(backend=counter)
    opt = ef.SAM(shard(model).parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    take_steps("closure", opt, evaluation(opt, model, quarter(rank)))
    assert counter.frame_count > 0
    return full(model.parameters())


def test_compiled_blocks(run_distributed: RunDistributed) -> None:
    results = run_distributed(train_compiled, WORLD)
    assert_alike(results, train_each_part("sam", HALVES), 1e-12)


def return_to_x(rank: int) -> dict[str, Any]:
    model = hybrid(reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    opt = ef.SAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt)
    closure = evaluation(opt, model, quarter(rank))
    before = [p.to_local().clone() for p in model.parameters()]
    closure()
    opt.ascend()
    point = full(model.parameters())
    opt.restore()
    same = all(map(torch.equal, [p.to_local() for p in model.parameters()], before))
    take_steps("closure", opt, closure)
    return {"same": same, "point": point, "after": full(model.parameters())}


def test_each_replica_returns_from_a_point_of_its_own(run_distributed: RunDistributed) -> None:
    results = run_distributed(return_to_x, WORLD)
    assert all(result["same"] for result in results)
    points = [result["point"] for result in results]
    for one, other, alike in ((0, 1, True), (2, 3, True), (0, 2, False)):
        assert all(map(torch.equal, points[one], points[other])) == alike
    assert_alike([r["after"] for r in results], train_each_part("sam", HALVES), 1e-12)


def accumulate(rank: int) -> list[Tensor]:
    """Micro-batches whose gradients FSDP2 reduces late: within the replica, or across both."""
    model = hybrid()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    inputs, targets = batch(quarter(rank))

    def closure() -> Tensor:
        opt.zero_grad()
        for i in range(2):
            model.set_requires_all_reduce(i == 1)
            part = slice(i, i + 1)
            loss: Tensor = (model(inputs[part]) - targets[part]).square().mean() / 2
            loss.backward()
        return loss

    take_steps("closure", opt, closure)
    return full(model.parameters())


def test_accumulation(run_distributed: RunDistributed) -> None:
    results = run_distributed(accumulate, WORLD)
    assert_alike(results, train_each_part("usam", HALVES), 1e-12)


def switch(rank: int) -> dict[str, Any]:
    """The mesh is whole again once ascents are synchronized, also after a pass with local ones."""
    model = hybrid()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, quarter(rank))
    ef.ascent_sync(model, opt, enabled=False)
    ef.ascent_sync(model, opt, enabled=False)
    data = [batch(quarter(rank))]
    op = ef.curvature.HessianOperator(model, nn.MSELoss(), data, engine="finite_difference")
    direction = torch.cat([p.to_local().flatten() for p in model.parameters()]).detach()
    closure()
    refused = error_message(lambda: op.matvec(direction))
    ef.ascent_sync(model, opt, enabled=True)
    op.matvec(direction)
    opt.zero_grad()
    take_steps("closure", opt, closure)
    return {"refused": refused, "after": full(model.parameters())}


def test_switched_on_again(run_distributed: RunDistributed) -> None:
    results = run_distributed(switch, WORLD)
    for result in results:
        assert "and ascent_sync(model, opt, enabled=True)" in result["refused"]
    after = [result["after"] for result in results]
    assert_alike(after, train_each_part("usam", [slice(None)]), 1e-12)


# Refusals.


def refuse(rank: int) -> dict[str, str]:
    def message(model: nn.Module, opt: Any = None) -> str:
        opt = ef.SGD(model.parameters()) if opt is None else opt
        return error_message(lambda: ef.ascent_sync(model, opt, enabled=False))

    flat = network()
    fully_shard(flat, mesh=init_device_mesh("cpu", (WORLD,)))
    copied = replicate(network(), mesh=init_device_mesh("cpu", (WORLD,)))
    divided = hybrid()
    divided[0].set_gradient_divide_factor(2.0)
    static = DistributedDataParallel(network(), static_graph=True)
    opt = ef.USAM(static.parameters(), **SETTINGS)
    ef.ascent_sync(static, opt)
    perturbed = DistributedDataParallel(network())
    other = ef.USAM(perturbed.parameters(), **SETTINGS)
    evaluation(other, perturbed, quarter(rank))()
    other.ascend()
    return {
        "unwrapped": message(network()),
        "FSDP1": message(flattened(True)),
        "FSDP2": message(flat),
        "replicate": message(copied),
        "divided": message(divided),
        "static graph": error_message(lambda: static(batch(quarter(rank))[0])),
        "perturbed": message(perturbed, other),
        "enabled": error_message(lambda: ef.ascent_sync(flat, ef.SGD(flat.parameters()), True)),
    }


REFUSALS = {
    "unwrapped": "pass the wrapped model",
    "FSDP1": "offers no local gradients of its shards",
    "FSDP2": "needs replicas of the model",
    "replicate": "replicate() of FSDP2 averages",
    "divided": "leave it out, and scale the loss",
    "static graph": "take one forward and backward pass, and opt.zero_grad(), before ascent_sync",
    "perturbed": "first end the step with step()",
    "enabled": "",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(run_distributed: RunDistributed, what: str) -> None:
    for messages in run_distributed(refuse, WORLD):
        assert REFUSALS[what] in messages[what]
        assert bool(messages[what]) == bool(REFUSALS[what])


def test_what_is_no_optimizer_of_the_library() -> None:
    model = network()
    with pytest.raises(TypeError, match="SGD is none of eigenfilter: pass USAM"):
        ef.ascent_sync(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="model must be a module, and is list"):
        ef.ascent_sync([model], ef.USAM(model.parameters()))  # type: ignore[arg-type]


def test_a_single_process_has_the_whole_gradient() -> None:
    model = network()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    take_steps("closure", opt, evaluation(opt, model, slice(None)))
    assert all(map(torch.equal, full(model.parameters()), train_each_part("usam", [slice(None)])))
    pickle.dumps(model)


class Wrapper(torch.optim.Optimizer):
    """As frameworks wrap an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_a_wrapped_optimizer_is_found() -> None:
    model = network()
    ef.ascent_sync(model, Wrapper(Wrapper(ef.USAM(model.parameters()))), enabled=False)


# Why FSDP2 without replicas is refused.


def unsharded_bytes(rank: int) -> dict[str, float]:
    """Bytes of gradient on this rank after a backward pass, for each byte of parameters."""
    sizes = {}
    for sync in (True, False):
        model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False))
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        model.set_requires_gradient_sync(sync)
        model(torch.ones(2, 16)).sum().backward()
        held = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
        for group in fsdp_groups(model):
            for p in group.fsdp_params:
                whole = p.unsharded_param.grad, p.unsharded_accumulated_grad
                held += [g for g in whole if g is not None]
        total = sum(p.numel() for p in model.parameters())
        sizes["synchronized" if sync else "local"] = sum(g.numel() for g in held) / total
    return sizes


def test_local_gradients_of_shards_are_whole(run_distributed: RunDistributed) -> None:
    for sizes in run_distributed(unsharded_bytes, WORLD):
        assert sizes == {"synchronized": 1 / WORLD, "local": 1.0}
