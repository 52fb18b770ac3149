"""`ascent_sync`: several modules and optimizers, and gradients that are local where none may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from optimizers.distributed_problem import SETTINGS, batch, error_message, evaluation, full, network
from optimizers.distributed_problem import share as half
from optimizers.test_local_ascents import take_steps, train_each_part
from optimizers.test_local_ascents_sharded import HALVES, WORLD, assert_alike, hybrid, quarter
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

OTHERS = "trainable parameters of the model are not in the optimizer's groups"
LOCAL = "along the gradient of this process alone"


def usam(params: Any) -> ef.USAM:
    return ef.USAM(params, **SETTINGS)


# Parameters of another optimizer.


def refuse_others(rank: int) -> dict[str, str]:
    model = DistributedDataParallel(network())
    first, *rest = model.parameters()
    frozen = network()
    frozen[0].requires_grad_(False)
    frozen_replicas = DistributedDataParallel(frozen)
    pair = nn.ModuleList(DistributedDataParallel(network()) for _ in range(2))
    shards = hybrid()

    def message(module: nn.Module, opt: Any) -> str:
        return error_message(lambda: ef.ascent_sync(module, opt, enabled=False))

    groups = [{"params": [first], "rho": 0.0}, {"params": rest}]
    return {
        "some": message(model, ef.SAM([first])),
        "wrapper": message(model, ef.SharpnessAware(torch.optim.SGD(rest, lr=0.1))),
        "shards": message(shards, ef.SAM(shards[0].parameters())),
        "two models": message(pair, ef.SAM(pair[0].parameters())),
        "groups": message(model, ef.SAM(groups)),
        "frozen": message(frozen_replicas, ef.SAM(frozen[2].parameters())),
        "one of two models": message(pair[0], ef.SAM(pair[0].parameters())),
        "part of the shards": message(shards[0], ef.SAM(shards[0].parameters())),
    }


REFUSED = ("some", "wrapper", "shards", "two models")


def test_parameters_of_another_optimizer(run_distributed: RunDistributed) -> None:
    for messages in run_distributed(refuse_others, WORLD):
        for what, message in messages.items():
            assert (OTHERS in message) == (what in REFUSED), what
            assert bool(message) == (what in REFUSED), message


def step_in_turn(rank: int) -> list[Tensor]:
    """Two optimizers of all parameters: when one is to descend, the gradient is whole."""
    model = DistributedDataParallel(network())
    opts = [usam(model.parameters()), ef.SAM(model.parameters(), lr=0.1, rho=0.2)]
    for opt in opts:
        ef.ascent_sync(model, opt, enabled=False)
    for form in ("closure", "explicit"):
        for opt in opts:
            take_steps(form, opt, evaluation(opt, model, half(rank)), steps=1)
    return full(model.parameters())


def test_two_optimizers_of_all_parameters(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(step_in_turn, 2)
    assert all(map(torch.equal, first, second))


def fail_after_success(rank: int) -> list[Tensor]:
    """A call that raises leaves what an earlier one has set."""
    model = DistributedDataParallel(network())
    opt = usam(model.parameters())
    ef.ascent_sync(model, opt, enabled=False)
    copied = replicate(network(), mesh=init_device_mesh("cpu", (2,)))
    for other in (nn.ModuleList([model, copied]), network()):
        assert error_message(lambda other=other: ef.ascent_sync(other, opt, enabled=False))
    assert error_message(lambda: ef.ascent_sync(model, ef.SAM(model.module[0].parameters())))
    ef.ascent_sync(network(), opt, enabled=True)  # another model's ascents
    take_steps("closure", opt, evaluation(opt, model, half(rank)))
    return full(model.parameters())


def test_a_refused_call_changes_nothing(run_distributed: RunDistributed) -> None:
    results = run_distributed(fail_after_success, 2)
    assert_alike(results, train_each_part("usam", [half(0), half(1)]), 1e-12)


# Several modules.


def chain(rank: int) -> dict[str, Any]:
    torch.manual_seed(6)
    first = DistributedDataParallel(nn.Linear(6, 5).double())
    second = DistributedDataParallel(nn.Linear(5, 1).double())
    both = nn.Sequential(first, second)
    opt = usam(both.parameters())
    closure = evaluation(opt, both, half(rank))
    ef.ascent_sync(both, opt, enabled=False)
    ef.ascent_sync(second, opt, enabled=True)
    closure()
    alike = []
    for module in (first, second):
        g = next(module.parameters()).grad.clone()
        dist.broadcast(g, src=0)
        alike.append(torch.equal(g, next(module.parameters()).grad))
    counts = [len(opt._step_state.with_local_ascents)]
    ef.ascent_sync(first, opt, enabled=True)
    counts.append(len(opt._step_state.with_local_ascents))
    return {"alike": alike, "counts": counts}


def test_modules_of_one_optimizer_are_switched_one_by_one(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(chain, 2)
    assert first == {"alike": [True, True], "counts": [1, 0]}
    assert second == {"alike": [False, True], "counts": [1, 0]}


class Twice(nn.Module):
    """Calls the module that wraps it once more, as a recursive network does."""

    outer: list[Any]

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.depth, self.fails = network(), [], 0, fails

    def forward(self, x: Tensor) -> Tensor:
        if self.depth == 0:
            self.depth = 1
            try:
                with torch.no_grad():
                    x = x + 0.1 * self.outer[0](x)
            finally:
                self.depth = 0
        elif self.fails:
            raise RuntimeError("the inner pass failed")
        output: Tensor = self.inner(x)
        return output


def call_again(rank: int, fails: bool) -> tuple[str, bool, list[Tensor]]:
    net = Twice(fails)
    model = DistributedDataParallel(net)
    net.outer.append(model)
    opt = usam(model.parameters())
    ef.ascent_sync(model, opt, enabled=False)
    message = error_message(lambda: model(batch(half(rank))[0]))
    net.fails = False
    synchronizes = bool(model.require_backward_grad_sync)
    take_steps("closure", opt, evaluation(opt, model, half(rank)))
    return message, synchronizes, full(model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_pass_within_another(run_distributed: RunDistributed, fails: bool) -> None:
    first, second = run_distributed(call_again, 2, fails)
    assert first[:2] == second[:2] == ("the inner pass failed" if fails else "", True)
    assert all(map(torch.equal, first[2], second[2]))


# Other forward methods of FSDP2.


class Computes(nn.Sequential):
    def compute(self, x: Tensor) -> Tensor:
        output: Tensor = self.forward(x)
        return output


def train_by_methods(rank: int, ascent: str, descent: str) -> list[Tensor]:
    model = Computes(*network())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "compute")
    opt = usam(model.parameters())
    ef.ascent_sync(model, opt, enabled=False)
    inputs, targets = batch(quarter(rank))
    methods: dict[str, Callable[[Tensor], Tensor]] = {"call": model, "compute": model.compute}

    def closure() -> Tensor:
        opt.zero_grad()
        output = methods[ascent if opt.phase == "ascent" else descent](inputs)
        loss = (output - targets).square().mean()
        loss.backward()
        return loss

    take_steps("closure", opt, closure)
    return full(model.parameters())


@pytest.mark.parametrize("ascent", ["call", "compute"])
@pytest.mark.parametrize("descent", ["call", "compute"])
def test_forward_methods_of_shards(
    run_distributed: RunDistributed, ascent: str, descent: str
) -> None:
    results = run_distributed(train_by_methods, WORLD, ascent, descent)
    assert_alike(results, train_each_part("usam", HALVES), 1e-12)


def shard_together(rank: int) -> list[Tensor]:
    """Modules of one call of fully_shard have one group of parameters."""
    model = network()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    fully_shard([model[0], model[2]], mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = usam(model.parameters())
    closure = evaluation(opt, model, quarter(rank))
    for enabled in (False, False, True, False):
        ef.ascent_sync(model, opt, enabled=enabled)
        closure()  # leaves a gradient of the phase
    opt.zero_grad()
    take_steps("explicit", opt, closure)
    return full(model.parameters())


def test_modules_that_are_sharded_together(run_distributed: RunDistributed) -> None:
    assert_alike(run_distributed(shard_together, WORLD), train_each_part("usam", HALVES), 1e-12)


# A local gradient is no descent's.


def descend_locally(rank: int, sharded: bool, change: str) -> dict[str, Any]:
    model: nn.Module = hybrid() if sharded else DistributedDataParallel(network())
    part = quarter(rank) if sharded else half(rank)
    opt = usam(model.parameters())
    scheduler = ef.schedulers.RhoScheduler(opt, lambda t: float(t == 0))
    ef.ascent_sync(model, opt, enabled=False)
    closure = evaluation(opt, model, part)
    before = full(model.parameters())
    closure()
    if change == "scheduler":
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()
    else:
        opt.param_groups[0]["rho"] = 0.0
    message = error_message(opt.step)
    unchanged = all(map(torch.equal, full(model.parameters()), before))
    with torch.no_grad():
        model(batch(part)[0])  # leaves the gradient as it is
    again = error_message(opt.step)
    closure()
    opt.step()
    moved = not any(map(torch.equal, full(model.parameters()), before))
    after = full(model.parameters())
    opt.param_groups[0]["rho"] = 0.1
    closure()
    opt.ascend()
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # from elsewhere, without a forward pass
    opt.step()
    return {"messages": (message, again), "kept": (unchanged, moved), "after": after}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("change", ["by hand", "scheduler"])
def test_a_local_gradient_is_no_descents(
    run_distributed: RunDistributed, sharded: bool, change: str
) -> None:
    results = run_distributed(descend_locally, WORLD if sharded else 2, sharded, change)
    for result in results:
        assert all(LOCAL in message for message in result["messages"])
        assert result["kept"] == (True, True)
        assert all(map(torch.equal, result["after"], results[0]["after"]))


def accumulate_across(rank: int) -> tuple[str, str, list[Tensor]]:
    """rho becomes 0 between two micro-batches: the second one's pass sums both over replicas."""
    model = DistributedDataParallel(network())
    opt = usam(model.parameters())
    ef.ascent_sync(model, opt, enabled=False)
    inputs = batch(half(rank))[0]
    model(inputs[:2]).sum().backward()
    opt.param_groups[0]["rho"] = 0.0
    with model.no_sync():
        model(inputs[2:]).sum().backward()
    unsynchronized = error_message(opt.step)
    model(inputs[2:]).sum().backward()
    return unsynchronized, error_message(opt.step), full(model.parameters())


def test_a_synchronized_pass_ends_it(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(accumulate_across, 2)
    for unsynchronized, message, _ in (first, second):
        assert LOCAL in unsynchronized
        assert message == ""
    assert all(map(torch.equal, first[2], second[2]))


def one_replica(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """One process, or the shards of one replica: its gradient is never less than the whole."""
    alone = [dist.new_group([i]) for i in range(dist.get_world_size())][rank]
    model = DistributedDataParallel(network(), process_group=alone)
    opt = usam(model.parameters())
    ef.ascent_sync(model, ef.SAM(model.module[0].parameters()), enabled=False)
    ef.ascent_sync(model, opt, enabled=False)
    take_steps("closure", opt, evaluation(opt, model, half(rank)))
    opt.zero_grad()
    model(batch(half(rank))[0]).sum().backward()
    opt.param_groups[0]["rho"] = 0.0
    opt.step()  # along the gradient of its only replica
    dist.barrier()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replica", "shard"))
    shards = network()
    fully_shard(shards, mesh=mesh)
    opt = usam(shards.parameters())
    ef.ascent_sync(shards, opt, enabled=False)
    take_steps("closure", opt, evaluation(opt, shards, half(rank)))
    shards(batch(half(rank))[0]).sum().backward()
    opt.param_groups[0]["rho"] = 0.0
    opt.step()
    return full(model.parameters()), full(shards.parameters())


def test_a_single_replica_has_the_whole_gradient(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(one_replica, 2)
    assert not any(map(torch.equal, first[0], second[0]))  # each trains alone
    assert all(map(torch.equal, first[1], second[1]))
