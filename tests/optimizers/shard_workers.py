"""What the two processes of `test_shards.py` do: shards that are no DTensors, and odd gradients.

ZeroRedundancyOptimizer, optimizers that work like it, and FullyShardedDataParallel (FSDP1).
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from optimizers import workers
from optimizers.workers import SETTINGS, STEPS, WORLD, batch, evaluation, full, network, share

PLAIN = {name: value for name, value in SETTINGS.items() if name != "rho"}

# Every optimizer that ascends, as a class with its arguments.
ASCENDING: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "usam": (ef.USAM, SETTINGS),
    "sam": (ef.SAM, SETTINGS),
    "asam": (ef.SAM, SETTINGS | {"adaptive": True}),
    "sequential": (ef.TwoStepUSAM, SETTINGS),
    "difference": (ef.HessianUSAM, SETTINGS),
    "product": (ef.HessianUSAM, SETTINGS | {"hvp": "autograd"}),
    "adamw": (ef.AdamW, {"lr": 0.05, "rho": 0.15}),
    "adamw sam": (ef.AdamW, {"lr": 0.05, "rho": 0.15, "method": "sam"}),
    "tensor rho": (ef.USAM, SETTINGS | {"rho": torch.tensor(0.15)}),
    "wrapper": (lambda params, **kw: ef.SharpnessAware(torch.optim.SGD(params, **kw)), PLAIN),
}

# What needs no norm, and is right on shards of any kind.
ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "usam": lambda params: ef.USAM(params, **SETTINGS),
    "sequential": workers.OPTIMIZERS["sequential"],
    "anchored": workers.OPTIMIZERS["anchored"],
    "adamw": lambda params: ef.AdamW(params, lr=0.05, eps=0.02, rho=0.15),
    "wrapper": workers.OPTIMIZERS["wrapper"],
}

METHODS: dict[str, dict[str, Any]] = {
    "usam": {},
    "sam": {},
    "two_step_usam": {"ascent": "anchored"},
    "hessian_usam": {"rho": 0.02},
}


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


class Complete(torch.optim.Optimizer):
    """An optimizer that constructs another one of all its parameters."""

    def __init__(self, params: Iterable[Tensor], **defaults: Any) -> None:
        super().__init__(params, defaults)
        self.optim = ef.USAM(self.param_groups[0]["params"], **defaults)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optim.step(closure)


def said_by(act: Callable[[], Any]) -> str:
    """The error that `act` raises, or nothing."""
    try:
        act()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return ""


# Scenarios: each is called with the rank, in both processes.


def zero_refused(rank: int) -> dict[str, str]:
    """What is said of an ascending optimizer inside one that gives each rank a part."""
    said = {}
    for outer in (ZeroRedundancyOptimizer, Partitioned):
        for name, (make, settings) in ASCENDING.items():
            params = network().parameters()
            construct = functools.partial(outer, params, optimizer_class=make, **settings)
            said[f"{outer.__name__} {name}"] = said_by(construct)
    return said


def zero_refused_later(rank: int) -> dict[str, tuple[str, bool]]:
    """rho set after construction, and a group with rho added then: nothing is written."""
    result = {}
    for way in ("set", "added", "explicit", "clip"):
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
        act = {"explicit": opt.step, "clip": lambda o=opt: o.optim.clip_grad_norm_(0.1)}
        said = said_by(act.get(way, functools.partial(opt.step, closure)))
        result[way] = said, all(map(torch.equal, full(model.parameters()), before))
    return result


def zero_descends(rank: int) -> dict[str, list[Tensor]]:
    """Optimizers that do not ascend, inside."""
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "sgd": (ef.SGD, PLAIN),
        "sgd skipping": (ef.SGD, PLAIN | {"skip_nonfinite": True}),
        "adamw": (ef.AdamW, {"lr": 0.05, "eps": 0.02}),
        "usam at rho 0": (ef.USAM, SETTINGS | {"rho": 0.0}),
    }
    result = {}
    for name, (make, settings) in ways.items():
        model = DistributedDataParallel(network())
        opt = ZeroRedundancyOptimizer(model.parameters(), make, **settings)
        result[name] = workers.trained(opt, model, share(rank))
    return result


def zero_of_an_ascending_one(rank: int) -> str:
    """An ascent around an optimizer that could take ascents itself, at rho 0."""
    base = ZeroRedundancyOptimizer(network().parameters(), ef.AdamW, lr=0.05)
    return said_by(functools.partial(ef.SharpnessAware, base, rho=0.15))


def zero_without_parameters(rank: int) -> list[Tensor]:
    """One parameter, so that one rank has none; with a flag that all share."""
    model = DistributedDataParallel(single())
    opt = ZeroRedundancyOptimizer(model.parameters(), ef.SGD, **PLAIN, skip_nonfinite=True)
    for _ in range(STEPS):
        opt.zero_grad()
        single_loss(model, INPUTS[rank : rank + 1]).backward()
        opt.step()
    return full(model.parameters())


def zero_inside(rank: int) -> dict[str, list[Tensor]]:
    """Every method around ZeroRedundancyOptimizer, of torch's optimizer and of ours."""
    result = {}
    for method, options in METHODS.items():
        for name, (make, settings) in BASES.items():
            model = DistributedDataParallel(network())
            base = ZeroRedundancyOptimizer(model.parameters(), make, **settings)
            opt = ef.SharpnessAware(base, method, **{"rho": 0.15} | options)
            result[f"{method} {name}"] = workers.trained(opt, model, share(rank))
    return result


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch": (torch.optim.AdamW, {"lr": 0.05, "eps": 0.02}),
    "ours": (ef.SGD, PLAIN),
}


def constructed_within_another(rank: int) -> list[Tensor]:
    model = DistributedDataParallel(network())
    return workers.trained(Complete(model.parameters(), **SETTINGS), model, share(rank))


def composite(rank: int) -> list[Tensor]:
    model = DistributedDataParallel(network())
    opt = Composite(model.parameters())
    closure = evaluation(opt, model, share(rank))
    for _ in range(STEPS):
        closure()
        while opt.matrices.ascend():
            closure()
        opt.step()
    return full(model.parameters())


def post_local(rank: int) -> list[Tensor]:
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


def flattened(
    original: bool, model: nn.Module | None = None, **kw: Any
) -> FullyShardedDataParallel:
    """The network under FSDP1, with its original parameters or with flat ones."""
    return FullyShardedDataParallel(
        model or network(), use_orig_params=original, device_id=torch.device("cpu"), **kw
    )


def gathered(model: FullyShardedDataParallel) -> Tensor:
    """All elements of the parameters, without padding at the end."""
    with FullyShardedDataParallel.summon_full_params(model):
        return torch.cat([p.detach().flatten() for p in model.parameters()])


def flat_elementwise(rank: int) -> dict[str, Tensor]:
    result = {}
    for original in (False, True):
        for name, make in ELEMENTWISE.items():
            model = flattened(original)
            workers.trained(make(model.parameters()), model, share(rank))
            result[f"{name} {original}"] = gathered(model)
    return result


def flat_nested(rank: int) -> list[Tensor]:
    """A flat parameter for each layer, under a whole that has none."""
    result = []
    for original in (False, True):
        model = network()
        for i in (0, 2):
            model[i] = flattened(original, model[i])
        whole = flattened(original, model)
        workers.trained(ELEMENTWISE["sequential"](whole.parameters()), whole, share(rank))
        result.append(gathered(whole))
    return result


def flat_forward_before_the_move(rank: int) -> list[Tensor]:
    """A forward pass alone leaves parameters gathered: after an ascent these copies are stale."""
    result = []
    for original in (False, True):
        for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
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
            result.append(gathered(whole))
    return result


def flat_restore(rank: int) -> list[bool]:
    """x comes back bit for bit, and the loss there with it."""
    result = []
    for original in (False, True):
        model = flattened(original)
        opt = ef.USAM(model.parameters(), **SETTINGS)
        closure = evaluation(opt, model, share(rank))
        before, loss = gathered(model), closure().item()
        opt.ascend()
        inputs, targets = batch(share(rank))
        with torch.no_grad():
            updated = (model(inputs) - targets).square().mean().item()
        opt.restore()
        again = closure().item()
        result.append(torch.equal(gathered(model), before) and loss == again != updated)
    return result


def flat_refused(rank: int) -> dict[str, str]:
    """What takes a norm, at construction or when rho is set later."""
    said = {}
    for original in (False, True):
        model = flattened(original)
        for name in ("sam", "asam", "difference", "adamw sam"):
            make, settings = ASCENDING[name]
            said[f"{name} {original}"] = said_by(
                functools.partial(make, model.parameters(), **settings)
            )
        base = torch.optim.SGD(model.parameters(), **PLAIN)
        said[f"wrapper {original}"] = said_by(functools.partial(ef.SharpnessAware, base, "sam"))
        opt = ef.SAM(model.parameters(), **SETTINGS | {"rho": 0.0})
        opt.param_groups[0]["rho"] = 0.1
        before = gathered(model)
        closure = evaluation(opt, model, share(rank))
        said[f"later {original}"] = said_by(functools.partial(opt.step, closure))
        assert torch.equal(gathered(model), before)
    return said


def flat_and_whole(rank: int) -> list[list[Tensor]]:
    """Flat parameters that FSDP1 does not shard: every rank has the whole norm."""
    result = []
    for original in (False, True):
        model = flattened(original, sharding_strategy=ShardingStrategy.NO_SHARD)
        opt = ef.SAM(model.parameters(), **SETTINGS)
        closure = evaluation(opt, model, share(rank))
        total = []
        for _ in range(STEPS):
            opt.zero_grad()
            closure()
            opt.ascend()
            closure()
            total.append(opt.clip_grad_norm_(1e9))
            opt.step()
        result.append([gathered(model), torch.stack(total)])
    return result


def flat_alone(rank: int) -> list[Tensor]:
    """Each rank shards a model of its own, over itself alone."""
    own = [dist.new_group([r]) for r in range(WORLD)][rank]
    result = []
    for original in (False, True):
        model = flattened(original, process_group=own)
        opt = ef.SAM(model.parameters(), **SETTINGS)
        result.append(gathered_after(opt, model, slice(None)))
    return result


def gathered_after(opt: Any, model: FullyShardedDataParallel, samples: slice) -> Tensor:
    workers.trained(opt, model, samples)
    return gathered(model)


def flat_frozen(rank: int) -> dict[str, str]:
    """gc.freeze() hides what handles the flat parameters."""
    said = {}
    for original in (False, True):
        model = flattened(original)
        opt = ef.USAM(model.parameters(), **SETTINGS)
        closure = evaluation(opt, model, share(rank))
        gc.freeze()
        try:
            before = [p.detach().clone() for p in model.parameters()]
            said[f"step {original}"] = said_by(functools.partial(opt.step, closure))
            make = functools.partial(ef.SAM, model.parameters(), **SETTINGS)
            said[f"made {original}"] = said_by(make)
            assert all(map(torch.equal, before, model.parameters()))
        finally:
            gc.unfreeze()
        opt.step(closure)
        gc.freeze()  # once they are known it does not matter
        try:
            opt.step(closure)
        finally:
            gc.unfreeze()
    return said


def flat_clip(rank: int) -> dict[str, Any]:
    """Our clipping is refused; the module's own clips the descent's gradient."""
    result: dict[str, Any] = {"said": []}
    for original in (False, True):
        model = flattened(original, network().float())
        opt = ef.USAM(model.parameters(), **SETTINGS)
        inputs, targets = (t.float() for t in batch(share(rank)))
        for _ in range(2):
            opt.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            opt.ascend()
        result["said"].append(said_by(functools.partial(opt.clip_grad_norm_, 0.125)))
        result[original] = model.clip_grad_norm_(0.125).item()
        opt.step()
    return result


def flat_without_elements(rank: int) -> list[Tensor]:
    """One rank has nothing of the parameter, nor of its gradient; with a flag that all share."""
    result = []
    for original in (False, True):
        model = flattened(original, single())
        result.append(single_trained(model, INPUTS[rank : rank + 1], gathered))
    return result


INPUTS = torch.tensor([[1.0], [2.0]], dtype=torch.float64)


def single() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(1, 1, bias=False).double()


def single_loss(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs).cos() - 0.3).square().mean()


def single_trained(model: nn.Module, inputs: Tensor, of: Callable[[Any], Tensor]) -> Tensor:
    """The one weight after steps in both forms."""
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
    return of(model)


def grouped(model: nn.Module, first: float, others: float) -> list[dict[str, Any]]:
    """Two groups, of which one rank holds next to nothing of the first or of the second."""
    params = list(model.parameters())
    return [{"params": params[:1], "rho": first}, {"params": params[1:], "rho": others}]


def flat_groups(rank: int) -> list[Tensor]:
    """Groups that do not ascend: a rank with gradients of these alone takes part all the same."""
    result = []
    for rhos in GROUPS:
        model = flattened(True)
        opt = ef.USAM(grouped(model, *rhos), **PLAIN, skip_nonfinite=True)
        workers.trained(opt, model, share(rank))
        result.append(gathered(model))
    return result


GROUPS = ((0.15, 0.0), (0.0, 0.15))


def flat_skip(rank: int) -> dict[bool, list[tuple[int, bool]]]:
    """The element that is not finite lies in one rank's shard: all skip."""
    result = {}
    for original in (False, True):
        model = flattened(original)
        opt = ef.USAM(model.parameters(), **SETTINGS, skip_nonfinite=True)
        closure = evaluation(opt, model, share(rank))
        before, each = gathered(model), []
        for spoilt in ("ascent", "descent", "neither"):
            for phase in ("ascent", "descent"):
                closure()
                if phase == spoilt and rank == 0:
                    next(p for p in model.parameters() if p.numel() > 3).grad.view(-1)[3] = (
                        torch.inf
                    )
                opt.ascend() if phase == "ascent" else opt.step()
            each.append((opt.skipped, torch.equal(gathered(model), before)))
        result[original] = each
    return result


def flat_scaler(rank: int) -> list[tuple[int, float, Tensor]]:
    """A step that one rank's gradient stops, and one that none does."""
    result = []
    for original in (False, True):
        model, scaler = flattened(original), ShardedGradScaler("cpu", init_scale=64.0)
        opt = ef.USAM(model.parameters(), **SETTINGS)
        inputs, targets = batch(share(rank))
        for spoilt in (True, False):
            for phase in ("ascent", "descent"):
                opt.zero_grad()
                scaler.scale((model(inputs) - targets).square().mean()).backward()
                if phase == "ascent":
                    opt.ascend(grad_scaler=scaler)
                    continue
                if spoilt and rank == 0:
                    next(p for p in model.parameters() if p.numel() > 3).grad.view(-1)[3] = (
                        torch.inf
                    )
                scaler.unscale_(opt)
                scaler.step(opt)
            scaler.update()
        result.append((opt.skipped, scaler.get_scale(), gathered(model)))
    return result


def flat_scaler_refused(rank: int) -> list[str]:
    """A scaler that looks at one shard alone, in the ascent or in the descent."""
    said = []
    inputs, targets = batch(share(rank))
    for kind in (torch.amp.GradScaler, ShardedGradScaler):
        model, scaler = flattened(True), kind("cpu", init_scale=64.0)
        opt = ef.USAM(model.parameters(), **SETTINGS)
        before = gathered(model)

        def backward(model: Any = model, opt: Any = opt, scaler: Any = scaler) -> None:
            opt.zero_grad()
            scaler.scale((model(inputs) - targets).square().mean()).backward()

        backward()
        line = said_by(functools.partial(opt.ascend, grad_scaler=scaler))
        if not line:
            backward()
            line = said_by(functools.partial(scaler.step, opt))
            opt.restore()
        said.append(line)
        assert torch.equal(gathered(model), before)
    return said


def flat_unsynchronized(rank: int) -> list[str]:
    """Gradients from no_sync() are whole, and the parameters are shards."""
    said = []
    for original in (False, True):
        model = flattened(original)
        opt = ef.USAM(model.parameters(), **SETTINGS)
        with model.no_sync():
            evaluation(opt, model, share(rank))()
        said.append(said_by(opt.ascend))
        assert not opt.perturbed
    return said


def odd_gradients(rank: int) -> dict[str, Tensor | str]:
    """Parameters and gradients that are placed, or made, in ways that do not match."""
    mesh = init_device_mesh("cpu", (WORLD,))
    values = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    ones = torch.ones_like(values)

    def placed(t: Tensor, how: Any) -> DTensor:
        return distribute_tensor(t.clone(), mesh, [how])

    def summand() -> DTensor:
        return DTensor.from_local(ones * (0.25, 0.75)[rank], mesh, [Partial()])

    def under_way() -> DTensor:
        return DTensor.from_local(AsyncCollectiveTensor(ones[:1].clone()), mesh, [Shard(0)])

    cases: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {
        "plain, summands": (values.clone(), summand),
        "plain, shards": (values.clone(), lambda: placed(ones, Shard(0))),
        "plain and transposed, shards": (values.t().clone().t(), lambda: placed(ones, Shard(0))),
        "shards, under way": (placed(values, Shard(0)), under_way),
        "shards, plain": (placed(values, Shard(0)), ones.clone),
        "whole, plain": (placed(values, Replicate()), lambda: ones * (rank + 1)),
    }
    result: dict[str, Tensor | str] = {}
    for name, (start, gradient) in cases.items():
        for kind in (ef.USAM, ef.SAM):
            p = nn.Parameter(start.clone())
            opt = kind([p], lr=1.0, rho=0.1, skip_nonfinite=True)

            def step(p: Any = p, opt: Any = opt, gradient: Any = gradient) -> None:
                p.grad = gradient()
                opt.ascend()
                p.grad = gradient()
                opt.step()

            result[f"{name}, {kind.__name__}"] = said_by(step) or full([p])[0]
    return result


def clip_mixed(rank: int) -> dict[str, Any]:
    """Clipping over plain parameters and DTensors on two meshes."""
    line, plane = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (WORLD, 1))
    values = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).reshape(5, 3)
    params = [
        nn.Parameter(values.clone()),
        nn.Parameter(distribute_tensor(values.clone(), line, [Shard(0)])),
        nn.Parameter(distribute_tensor(values.clone(), plane, [Shard(0), Replicate()])),
        nn.Parameter(values.clone()),  # without a gradient
    ]
    opt = ef.SGD(params, lr=0.1)
    for p in params[:3]:
        p.grad = p.detach() * 2
    total = opt.clip_grad_norm_(0.5)
    return {"total": total.item(), "grads": full([p.grad for p in params[:3]])}


SCENARIOS: dict[str, Callable[[int], Any]] = {
    scenario.__name__: scenario
    for scenario in (
        zero_refused,
        zero_refused_later,
        zero_descends,
        zero_of_an_ascending_one,
        zero_without_parameters,
        zero_inside,
        constructed_within_another,
        composite,
        post_local,
        flat_elementwise,
        flat_nested,
        flat_forward_before_the_move,
        flat_restore,
        flat_refused,
        flat_and_whole,
        flat_alone,
        flat_frozen,
        flat_clip,
        flat_without_elements,
        flat_groups,
        flat_skip,
        flat_scaler,
        flat_scaler_refused,
        flat_unsynchronized,
        odd_gradients,
        clip_mixed,
    )
}


def main(rank: int, folder: str) -> None:
    """Run all scenarios; write their results or tracebacks to a file."""
    workers.run(SCENARIOS, rank, folder)
