"""The scenarios of the two processes of `test_distributed.py`; each returns its results.

Models are float64, so that results differ from a single process's by the order of sums alone.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
import group

WORLD = 2
SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "rho": 0.15}
STEPS = 4

# What beside USAM is run under DDP and FSDP2.
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sam": lambda params: ef.SAM(params, **SETTINGS),
    "asam": lambda params: ef.SAM(params, **SETTINGS, adaptive=True),
    "sequential": lambda params: ef.TwoStepUSAM(params, **SETTINGS),
    "anchored": lambda params: ef.TwoStepUSAM(params, **SETTINGS, ascent="anchored"),
    "difference": lambda params: ef.HessianUSAM(params, **SETTINGS | {"rho": 0.02}),
    "adamw": lambda params: ef.AdamW(params, lr=0.05, eps=0.02, method="sam", rho=0.15),
    "wrapper": lambda params: ef.SharpnessAware(
        torch.optim.AdamW(params, lr=0.05, eps=0.02), "two_step_usam", rho=0.15
    ),
}

Evaluate = Callable[[], Tensor]


def network() -> nn.Sequential:
    """Layers that two processes cannot share evenly: 5 rows, and 1."""
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch(part: slice) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a part of eight samples."""
    generator = torch.Generator().manual_seed(12)
    inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return inputs[part], inputs[part].sin().sum(dim=1, keepdim=True)


def share(rank: int) -> slice:
    return slice(rank * 4, rank * 4 + 4)


def evaluation(opt: torch.optim.Optimizer, model: nn.Module, part: slice) -> Evaluate:
    """A closure that leaves the gradient of the mean over a part of the samples."""
    inputs, targets = batch(part)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    return closure


def full(params: Iterable[Tensor]) -> list[Tensor]:
    """Whole parameters, of DTensors too (collective)."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in params]


def trained(opt: Any, model: nn.Module, part: slice) -> list[Tensor]:
    """Parameters after some steps on a part of the samples."""
    closure = evaluation(opt, model, part)
    for _ in range(STEPS):
        opt.step(closure)
    return full(model.parameters())


def alone(name: str = "", **options: Any) -> list[Tensor]:
    """Parameters after the same steps in one process on all samples, with USAM by default."""
    model = network()
    params = model.parameters()
    opt = OPTIMIZERS[name](params) if name else ef.USAM(params, **SETTINGS | options)
    return trained(opt, model, slice(None))


def sharded(**options: Any) -> nn.Sequential:
    """The network under FSDP2: a group for each layer, one for the whole."""
    model = network()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


# Scenarios: each is called with the rank, in both processes.


def ddp(rank: int) -> list[Tensor]:
    model = DistributedDataParallel(network())
    return trained(ef.USAM(model.parameters(), **SETTINGS), model, share(rank))


def ddp_others(rank: int) -> dict[str, list[Tensor]]:
    result = {}
    for name, make in OPTIMIZERS.items():
        model = DistributedDataParallel(network())
        result[name] = trained(make(model.parameters()), model, share(rank))
    return result


def ddp_skip(rank: int) -> dict[str, Any]:
    """One process's ascent, which is not synchronized, is not finite: all skip."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS, skip_nonfinite=True)
    closure = evaluation(opt, model, share(rank))
    before = full(model.parameters())
    with model.no_sync():
        closure()
    if rank == 1:
        next(model.parameters()).grad[2, 3] = torch.nan
    opt.ascend()
    moved = not all(map(torch.equal, full(model.parameters()), before))
    closure()
    opt.step()
    return {"moved": moved, "skipped": opt.skipped, "params": full(model.parameters())}


def ddp_local_ascent(rank: int) -> list[Tensor]:
    """Each process ascends along its own gradient; the descent is shared, so all stay equal."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    for _ in range(STEPS):
        with model.no_sync():
            closure()
        opt.ascend()
        closure()
        opt.step()
    return full(model.parameters())


def released(rank: int) -> list[str]:
    """What is said of gradients that would be applied before they are reduced."""
    said = []
    for model in (DistributedDataParallel(network()), sharded()):
        before = [p.clone() for p in full(model.parameters())]
        opt = ef.SGD(model.parameters(), lr=0.1, release_gradients=True)
        try:
            opt.step(evaluation(opt, model, share(rank)))
        except RuntimeError as error:
            said.append(str(error))
        assert all(map(torch.equal, full(model.parameters()), before))
    return said


def fsdp(rank: int) -> list[Tensor]:
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    params = trained(opt, model, share(rank))
    assert all(s["momentum_buffer"].placements for s in opt.state.values())
    return params


def fsdp_kept_gathered(rank: int) -> list[Tensor]:
    """Backward leaves parameters gathered: after an ascent these copies are stale."""
    model = sharded()
    model.set_reshard_after_backward(False)
    return trained(ef.USAM(model.parameters(), **SETTINGS), model, share(rank))


def fsdp_others(rank: int) -> dict[str, list[Tensor]]:
    """Gathered parameters are stale after each of several ascents."""
    result = {}
    for name, make in OPTIMIZERS.items():
        model = sharded()
        model.set_reshard_after_backward(False)
        result[name] = trained(make(model.parameters()), model, share(rank))
    return result


def fsdp_forward_before_the_move(rank: int) -> list[Tensor]:
    """So does a forward pass alone, between the gradient and the ascent."""
    model = sharded(reshard_after_forward=False)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    inputs, _ = batch(share(rank))
    for _ in range(STEPS):
        closure()
        model(inputs)
        while opt.ascend():
            closure()
        model(inputs)
        opt.step()
    return full(model.parameters())


def fsdp_skip(rank: int) -> dict[str, Any]:
    """The element that is not finite lies in one process's shard: all skip."""
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS, skip_nonfinite=True)
    closure = evaluation(opt, model, share(rank))
    before, counts, kept = full(model.parameters()), [], []
    for spoilt in ("ascent", "descent", "neither"):
        for phase in ("ascent", "descent"):
            closure()
            if phase == spoilt and rank == 0:
                next(model.parameters()).grad.to_local()[1, 1] = torch.inf
            opt.ascend() if phase == "ascent" else opt.step()
        counts.append(opt.skipped)
        kept.append(all(map(torch.equal, full(model.parameters()), before)))
    return {"skipped": counts, "kept": kept, "params": full(model.parameters())}


def fsdp_scaler(rank: int) -> dict[str, Any]:
    """scaler.step looks at the local shard; what it finds has to stop every process."""
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    inputs, targets = batch(share(rank))
    before, kept = full(model.parameters()), []
    for spoilt in (True, False):
        for phase in ("ascent", "descent"):
            opt.zero_grad()
            scaler.scale((model(inputs) - targets).square().mean()).backward()
            if phase == "descent" and spoilt and rank == 0:
                next(model.parameters()).grad.to_local()[1, 1] = torch.nan
            opt.ascend(grad_scaler=scaler) if phase == "ascent" else scaler.step(opt)
        scaler.update()
        kept.append(all(map(torch.equal, full(model.parameters()), before)))
    return {
        "skipped": opt.skipped,
        "kept": kept,
        "scale": scaler.get_scale(),
        "params": full(model.parameters()),
    }


def fsdp_restore(rank: int) -> bool:
    """x and its loss are restored bit for bit: no copy of the perturbed point stays."""
    model = sharded()
    model.set_reshard_after_backward(False)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    before = full(model.parameters())
    loss = closure().item()
    opt.ascend()
    moved = closure().item()
    opt.restore()
    again = closure().item()
    same = all(map(torch.equal, full(model.parameters()), before))
    return same and loss == again and loss != moved


def fsdp_clip(rank: int) -> dict[str, Any]:
    """The norm is that of the whole gradient, not of a shard."""
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    closure()
    opt.ascend()
    closure()
    total = opt.clip_grad_norm_(0.125)
    (total,) = full([total])
    grads = torch.cat([g.flatten() for g in full([p.grad for p in model.parameters()])])
    return {"total": total.item(), "clipped": grads.norm().item()}


def fsdp_checkpoint(rank: int) -> list[Tensor]:
    """Saved and loaded by torch.distributed.checkpoint into a new optimizer, half way."""
    from torch.distributed.checkpoint import state_dict as dcp

    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    for _ in range(STEPS // 2):
        opt.step(closure)
    opt.zero_grad()
    saved = dcp.get_optimizer_state_dict(model, opt)
    other = ef.USAM(model.parameters(), **SETTINGS | {"lr": 7.0})
    dcp.set_optimizer_state_dict(model, other, saved)
    closure = evaluation(other, model, share(rank))
    for _ in range(STEPS - STEPS // 2):
        other.step(closure)
    return full(model.parameters())


def gradient_placed_otherwise(rank: int) -> list[Tensor]:
    """A parameter in shards with a gradient that every process has whole."""
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    p = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    opt = ef.USAM([p], lr=1.0, momentum=0.5, rho=0.1)
    for take in (opt.ascend, opt.step):
        p.grad = distribute_tensor(whole + 1, mesh, [Replicate()])
        take()
    return full([p])


def placed_in_every_way() -> Callable[[Tensor], list[Tensor]]:
    """Places a tensor of five rows: none, whole, in shards, of which one is empty, on two axes."""
    line, plane = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (WORLD, 1))
    return lambda t: [
        t.clone(),
        distribute_tensor(t.clone(), line, [Replicate()]),
        distribute_tensor(t.clone(), line, [Shard(0)]),
        distribute_tensor(t[:1].clone(), line, [Shard(0)]),
        distribute_tensor(t.clone(), plane, [Shard(0), Replicate()]),
    ]


def mixed_placements(rank: int) -> dict[str, list[Tensor]]:
    """A norm is summed over shards, and counts what every process has whole once."""
    return {name: stepped(name, placed_in_every_way()) for name in ("sam", "asam", "difference")}


def stepped(name: str, place: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """A step with gradients 1, 2, ... times the parameters, each placed as they are."""
    whole = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).reshape(5, 3)
    params = [nn.Parameter(p) for p in place(whole)]
    opt = OPTIMIZERS[name](params)

    def closure() -> None:
        for i, p in enumerate(params):
            p.grad = p.detach() * (i + 1)

    opt.step(closure)
    return full(params)


def partial_gradient(rank: int) -> list[Tensor]:
    """A parameter that every process has whole, with a gradient of which each has a summand."""
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    p = nn.Parameter(distribute_tensor(whole.clone(), mesh, [Replicate()]))
    opt = ef.USAM([p], lr=1.0, momentum=0.5, rho=0.1)
    for take in (opt.ascend, opt.step):
        p.grad = DTensor.from_local((whole + 1) * (0.25, 0.75)[rank], mesh, [Partial()])
        take()
    return full([p])


SCENARIOS: dict[str, Callable[[int], Any]] = {
    scenario.__name__: scenario
    for scenario in (
        ddp,
        ddp_others,
        ddp_skip,
        ddp_local_ascent,
        released,
        fsdp,
        fsdp_others,
        fsdp_kept_gathered,
        fsdp_forward_before_the_move,
        fsdp_skip,
        fsdp_scaler,
        fsdp_restore,
        fsdp_clip,
        fsdp_checkpoint,
        gradient_placed_otherwise,
        mixed_placements,
        partial_gradient,
    )
}


def main(rank: int, folder: str) -> None:
    """Run all scenarios; write their results or tracebacks to a file."""
    run(SCENARIOS, rank, folder)


def run(scenarios: dict[str, Callable[[int], Any]], rank: int, folder: str) -> None:
    """Run some scenarios in this process, one of `WORLD`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    result: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        try:
            result[name] = scenario(rank)
        except Exception:
            result[name] = traceback.format_exc()
        dist.barrier()
    torch.save(result, f"{folder}/{rank}.pt")
    group.leave()
