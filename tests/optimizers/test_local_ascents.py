"""`ascent_sync`: ascents along local gradients, in which nothing is communicated."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

import eigenfilter as ef
from optimizers.distributed_problem import (
    OPTIMIZERS,
    SETTINGS,
    STEPS,
    Block,
    batch,
    evaluation,
    full,
    network,
    share,
)
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed


def train_each_part(name: str, parts: list[slice]) -> list[Tensor]:
    """The definition, in one process: an ascent for each part, and the mean of the gradients there.

    An optimizer of each part leads to its point; its descent is given the mean.
    """
    models = [network() for _ in parts]
    opts = [OPTIMIZERS[name](model.parameters()) for model in models]
    closures = [evaluation(o, m, part) for o, m, part in zip(opts, models, parts, strict=True)]
    for _ in range(STEPS):
        for opt, closure in zip(opts, closures, strict=True):
            while opt.phase == "ascent":
                with opt.evaluation():
                    closure()
                opt.ascend()
            closure()
        means = [
            torch.stack([p.grad for p in params]).mean(dim=0)
            for params in zip(*(model.parameters() for model in models), strict=True)
        ]
        for opt, model in zip(opts, models, strict=True):
            for p, mean in zip(model.parameters(), means, strict=True):
                p.grad.copy_(mean)
            opt.step()
    return full(models[0].parameters())


def take_steps(form: str, opt: Any, closure: Callable[[], Tensor], steps: int = STEPS) -> None:
    for _ in range(steps):
        if form == "closure":
            opt.step(closure)
            continue
        with opt.evaluation():
            closure()
        while opt.ascend():
            with opt.evaluation():
                closure()
        opt.step()


def train_replicas(rank: int, name: str, form: str) -> list[Tensor]:
    model = DistributedDataParallel(network())
    opt = OPTIMIZERS[name](model.parameters())
    ef.ascent_sync(model, opt, enabled=False)
    take_steps(form, opt, evaluation(opt, model, share(rank)))
    return full(model.parameters())


@pytest.mark.parametrize("form", ["closure", "explicit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_mean_of_the_gradients_at_points_of_their_own(
    run_distributed: RunDistributed, name: str, form: str
) -> None:
    first, second = run_distributed(train_replicas, 2, name, form)
    assert all(map(torch.equal, first, second))
    expected = train_each_part(name, [share(0), share(1)])
    rounding = 1e-7 if name == "difference" else 1e-12
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    together = train_each_part(name, [slice(None)])
    assert min(float((a - b).abs().max()) for a, b in zip(first, together, strict=True)) > 1e-5


def points_of_a_step(rank: int, name: str) -> dict[str, Any]:
    """Where a step leads: to a point of its own on each rank, and back to x."""
    model = DistributedDataParallel(network())
    opt = OPTIMIZERS[name](model.parameters())
    ef.ascent_sync(model, opt)
    closure = evaluation(opt, model, share(rank))
    opt.step(closure)
    x = full(model.parameters())
    points = []
    while opt.phase == "ascent":
        with opt.evaluation():
            closure()
        opt.ascend()
        points.append(full(model.parameters()))
    opt.restore()
    restored = all(map(torch.equal, full(model.parameters()), x))
    opt.zero_grad()
    opt.step(closure)
    return {"points": points, "restored": restored, "after": full(model.parameters())}


@pytest.mark.parametrize("name", ["sam", "sequential", "difference"])
def test_each_rank_returns_from_a_point_of_its_own(
    run_distributed: RunDistributed, name: str
) -> None:
    first, second = run_distributed(points_of_a_step, 2, name)
    assert first["restored"]
    assert second["restored"]
    for one, other in zip(first["points"], second["points"], strict=True):
        assert not any(map(torch.equal, one, other))
    assert all(map(torch.equal, first["after"], second["after"]))


# Options of the wrapper, of the optimizer and of the loop.


def wrapped(options: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any]:
    model = DistributedDataParallel(network(), **options)
    opt = ef.USAM(model.parameters(), **SETTINGS, **settings)
    if options.get("static_graph"):
        model(batch(slice(None))[0]).sum().backward()
        opt.zero_grad()
    ef.ascent_sync(model, opt, enabled=False)
    return model, opt


def train_with(rank: int, options: dict[str, Any], settings: dict[str, Any]) -> list[Tensor]:
    model, opt = wrapped(options, settings)
    take_steps("explicit", opt, evaluation(opt, model, share(rank)))
    return full(model.parameters())


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"gradient_as_bucket_view": True}, {}),
        ({"gradient_as_bucket_view": True}, {"set_to_none": False}),
        ({"find_unused_parameters": True}, {"set_to_none": False}),
        ({"static_graph": True}, {}),
        ({}, {"skip_nonfinite": True}),
    ],
)
def test_options_do_not_change_the_steps(
    run_distributed: RunDistributed, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    for result in run_distributed(train_with, 2, options, settings):
        expected = train_each_part("usam", [share(0), share(1)])
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def accumulate(rank: int, form: str) -> list[Tensor]:
    """Two micro-batches, of which `no_sync` leaves the first local in both phases."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    inputs, targets = batch(share(rank))

    def closure() -> Tensor:
        opt.zero_grad()
        with model.no_sync():
            ((model(inputs[:2]) - targets[:2]).square().mean() / 2).backward()
        loss = (model(inputs[2:]) - targets[2:]).square().mean() / 2
        loss.backward()
        return loss

    take_steps(form, opt, closure)
    assert model.require_backward_grad_sync
    return full(model.parameters())


@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_accumulation(run_distributed: RunDistributed, form: str) -> None:
    for result in run_distributed(accumulate, 2, form):
        expected = train_each_part("usam", [share(0), share(1)])
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def switch(rank: int) -> list[list[Tensor]]:
    """On, off, and without ascents."""
    results = []
    for sequence in ([False, True], [False, False, True], [True]):
        model = DistributedDataParallel(network())
        opt = ef.USAM(model.parameters(), **SETTINGS)
        for enabled in sequence:
            ef.ascent_sync(model, opt, enabled=enabled)
        take_steps("closure", opt, evaluation(opt, model, share(rank)))
        results.append(full(model.parameters()))
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS | {"rho": 0.0})
    ef.ascent_sync(model, opt, enabled=False)
    take_steps("closure", opt, evaluation(opt, model, share(rank)))
    return [*results, full(model.parameters())]


def test_switched_on_again(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(switch, 2)
    together = train_each_part("usam", [slice(None)])
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, other))
    for result in first[:3]:
        torch.testing.assert_close(result, together, rtol=1e-12, atol=1e-12)
    assert not torch.equal(first[3][0], first[2][0])


class Halves(nn.Module):
    """Each rank uses a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(3, 2).double()
        self.heads = nn.ModuleList(nn.Linear(2, 1).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.heads[dist.get_rank()](self.body(x).tanh())
        return output


def use_one_head(rank: int, method: str) -> list[Tensor]:
    """Only the first head's group has a radius: rank 1 has no gradient to ascend along."""
    model = DistributedDataParallel(Halves(), find_unused_parameters=True)
    groups = [
        {"params": [*model.module.body.parameters(), *model.module.heads[1].parameters()]},
        {"params": model.module.heads[0].parameters(), "rho": 0.2},
    ]
    make = {"usam": ef.USAM, "sam": ef.SAM, "two_step_usam": ef.TwoStepUSAM}[method]
    opt = make(groups, lr=0.1, rho=0.0)
    ef.ascent_sync(model, opt, enabled=False)
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def closure() -> Tensor:
        opt.zero_grad()
        loss: Tensor = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    take_steps("closure", opt, closure)
    return full(model.parameters())


@pytest.mark.parametrize("method", ["usam", "sam", "two_step_usam"])
def test_a_rank_without_a_gradient_descends_with_the_others(
    run_distributed: RunDistributed, method: str
) -> None:
    first, second = run_distributed(use_one_head, 2, method)
    assert all(map(torch.equal, first, second))
    start = [p.detach() for p in Halves().parameters()]
    assert not any(map(torch.equal, first, start))


def scale(rank: int) -> dict[str, Any]:
    """A local gradient that is not finite stops every rank, and lowers the scale of all."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    inputs, targets = batch(share(rank))
    before = full(model.parameters())
    unchanged = []
    for spoiled in (True, False):
        for phase in ("ascent", "descent"):
            opt.zero_grad()
            scaler.scale((model(inputs) - targets).square().mean()).backward()
            if phase == "ascent" and spoiled and rank == 1:
                next(model.parameters()).grad[1, 1] = torch.nan
            opt.ascend(grad_scaler=scaler) if phase == "ascent" else scaler.step(opt)
        scaler.update()
        unchanged.append(all(map(torch.equal, full(model.parameters()), before)))
    return {"unchanged": unchanged, "scale": scaler.get_scale(), "after": full(model.parameters())}


def test_a_scaler(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(scale, 2)
    assert first["unchanged"] == second["unchanged"] == [True, False]
    assert first["scale"] == second["scale"]
    assert all(map(torch.equal, first["after"], second["after"]))


def normalize(rank: int) -> list[Tensor]:
    """Running statistics are those at x, and equal on all ranks once they are broadcast."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()
    model = DistributedDataParallel(net)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    closure = evaluation(opt, model, share(rank))
    for _ in range(STEPS):
        closure()
        opt.ascend()
        with ef.freeze_running_stats(model):
            closure()
        opt.step()
    model(batch(share(rank))[0])
    return [*full(model.parameters()), net[1].num_batches_tracked]


def test_running_statistics(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(normalize, 2)
    assert all(map(torch.equal, first, second))
    assert first[-1] == STEPS + 1


def copy_models(rank: int) -> list[bool]:
    """A copy trains by itself: what was hooked belongs to the first model's optimizer."""
    model = DistributedDataParallel(network())
    opt = ef.USAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    alike = []
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(batch(share(rank))[0]).sum().backward()
        grads = [p.grad.clone() for p in other.parameters()]
        for g in grads:
            dist.broadcast(g, src=0)
        alike.append(all(map(torch.equal, grads, [p.grad for p in other.parameters()])))
    del opt
    model(batch(share(rank))[0]).sum().backward()  # its optimizer is gone
    g = next(model.parameters()).grad.clone()
    dist.broadcast(g, src=0)
    return [*alike, torch.equal(g, next(model.parameters()).grad)]


def test_copies_synchronize(run_distributed: RunDistributed) -> None:
    assert run_distributed(copy_models, 2) == [[True, True, True]] * 2


def compile_replicas(rank: int, what: str) -> list[Tensor]:
    torch.compiler.reset()
    net, counter = Block(network()), CompileCounter()
    if what == "inside":
        model: Any = DistributedDataParallel(torch.compile(net, backend=counter))
    else:
        model = torch.compile(DistributedDataParallel(net), backend=counter)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    ef.ascent_sync(model, opt, enabled=False)
    take_steps("closure", opt, evaluation(opt, model, share(rank)))
    assert counter.frame_count > 0
    return full(net.parameters())


@pytest.mark.parametrize("what", ["inside", "around"])
def test_compiled(run_distributed: RunDistributed, what: str) -> None:
    first, second = run_distributed(compile_replicas, 2, what)
    assert all(map(torch.equal, first, second))
    expected = train_each_part("usam", [share(0), share(1)])
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
