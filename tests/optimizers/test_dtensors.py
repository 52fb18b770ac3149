"""Parameters and gradients as DTensors that are placed in different ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import eigenfilter as ef
from optimizers.distributed_problem import OPTIMIZERS, WORLD, error_message, full
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed


def place_in_every_way() -> Callable[[Tensor], list[Tensor]]:
    """Places a tensor of five rows: none, whole, in shards, of which one is empty, on two axes."""
    line, plane = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (WORLD, 1))
    return lambda t: [
        t.clone(),
        distribute_tensor(t.clone(), line, [Replicate()]),
        distribute_tensor(t.clone(), line, [Shard(0)]),
        distribute_tensor(t[:1].clone(), line, [Shard(0)]),
        distribute_tensor(t.clone(), plane, [Shard(0), Replicate()]),
    ]


def step(name: str, place: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """A step with gradients 1, 2, ... times the parameters, each placed as they are."""
    whole = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).reshape(5, 3)
    params = [nn.Parameter(p) for p in place(whole)]
    opt = OPTIMIZERS[name](params)

    def closure() -> None:
        for i, p in enumerate(params):
            p.grad = p.detach() * (i + 1)

    opt.step(closure)
    return full(params)


def step_in_every_placement(rank: int, name: str) -> list[Tensor]:
    return step(name, place_in_every_way())


@pytest.mark.parametrize("name", ["sam", "asam", "difference"])
def test_a_norm_counts_what_is_whole_once_and_sums_over_shards(
    run_distributed: RunDistributed, name: str
) -> None:
    first, second = run_distributed(step_in_every_placement, 2, name)
    expected = step(name, lambda t: [t.clone(), t.clone(), t.clone(), t[:1], t.clone()])
    rounding = 1e-7 if name == "difference" else 1e-14
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


AHEAD: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: ef.SGD(p, lr=0.1, momentum=0.9, extrapolation=0.2),
    "adamw": lambda p: ef.AdamW(p, lr=0.1, betas=(0.8, 0.9), eps=0.1, extrapolation=0.2),
}


def steps_ahead(name: str, place: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """The points y and x after two steps of an extrapolated method."""
    whole = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).reshape(5, 3)
    params = [nn.Parameter(p) for p in place(whole)]
    opt = AHEAD[name](params)
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = p.detach() * (i + 1)
        opt.step()
    y = [t.clone() for t in full(params)]  # what is replicated is the memory of the parameter
    opt.eval()
    x = [t.clone() for t in full(params)]
    opt.train()
    torch.testing.assert_close(full(params), y, rtol=1e-14, atol=1e-14)
    return y + x


def steps_ahead_in_every_placement(rank: int, name: str) -> list[Tensor]:
    return steps_ahead(name, place_in_every_way())


@pytest.mark.parametrize("name", AHEAD)
def test_an_extrapolation_of_every_placement(run_distributed: RunDistributed, name: str) -> None:
    first, second = run_distributed(steps_ahead_in_every_placement, 2, name)
    expected = steps_ahead(name, lambda t: [t.clone(), t.clone(), t.clone(), t[:1], t.clone()])
    torch.testing.assert_close(first, expected, rtol=1e-14, atol=1e-14)
    assert all(map(torch.equal, first, second))
    half = len(first) // 2
    assert not any(map(torch.equal, first[:half], first[half:]))


def gradient_placed_otherwise(rank: int) -> list[Tensor]:
    """A parameter in shards with a gradient that every process has whole."""
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    p = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    opt = ef.USAM([p], lr=1.0, momentum=0.5, rho=0.1)
    for act in (opt.ascend, opt.step):
        p.grad = distribute_tensor(whole + 1, mesh, [Replicate()])
        act()
    return full([p])


def partial_gradient(rank: int) -> list[Tensor]:
    """A parameter that every process has whole, with a gradient of which each has a summand."""
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    p = nn.Parameter(distribute_tensor(whole.clone(), mesh, [Replicate()]))
    opt = ef.USAM([p], lr=1.0, momentum=0.5, rho=0.1)
    for act in (opt.ascend, opt.step):
        p.grad = DTensor.from_local((whole + 1) * (0.25, 0.75)[rank], mesh, [Partial()])
        act()
    return full([p])


@pytest.mark.parametrize("scenario", [gradient_placed_otherwise, partial_gradient])
def test_a_gradient_placed_otherwise_is_redistributed(
    run_distributed: RunDistributed, scenario: Any
) -> None:
    for (result,) in run_distributed(scenario, 2):
        assert torch.equal(result, torch.full_like(result, -1.0))


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
    results: dict[str, Tensor | str] = {}
    for name, (start, gradient) in cases.items():
        for kind in (ef.USAM, ef.SAM):
            p = nn.Parameter(start.clone())
            opt = kind([p], lr=1.0, rho=0.1, skip_nonfinite=True)

            def both_phases(p: Any = p, opt: Any = opt, gradient: Any = gradient) -> None:
                p.grad = gradient()
                opt.ascend()
                p.grad = gradient()
                opt.step()

            results[f"{name}, {kind.__name__}"] = error_message(both_phases) or full([p])[0]
    return results


def test_gradients_that_are_placed_otherwise(run_distributed: RunDistributed) -> None:
    expected = torch.arange(6.0, dtype=torch.float64).reshape(2, 3) - 1
    for results in run_distributed(odd_gradients, 2):
        assert len(results) == 12
        for name, result in results.items():
            if "s, plain" in name or "whole, plain" in name:
                assert "say how it is placed with DTensor.from_local" in result, name
            else:
                assert torch.equal(result, expected), name


def clip_on_two_meshes(rank: int) -> dict[str, Any]:
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


def test_clipping_over_parameters_that_are_placed_in_different_ways(
    run_distributed: RunDistributed,
) -> None:
    values = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).reshape(5, 3)
    total = (3 * (2 * values).square().sum()).sqrt().item()
    for result in run_distributed(clip_on_two_meshes, 2):
        assert result["total"] == pytest.approx(total, rel=1e-12)
        for g in result["grads"]:
            torch.testing.assert_close(g, 2 * values * 0.5 / (total + 1e-6), rtol=1e-12, atol=0)
