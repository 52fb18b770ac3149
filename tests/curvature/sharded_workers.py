"""Scenarios that the processes of `test_sharded.py` run; each returns its results."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import group
from curvature.dense import decaying, operator
from eigenfilter import curvature
from eigenfilter.curvature import GGNOperator, HessianOperator

SAMPLES = 41
N = 130


def network() -> nn.Sequential:
    """Layers of five rows and one row: with four processes the last one has no rows."""
    torch.manual_seed(41)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(42)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return x, x.sin().sum(dim=1, keepdim=True)


def share(rank: int, size: int) -> slice:
    """Half of the samples for the first process, the rest evenly among the others."""
    if rank == 0:
        return slice(SAMPLES // 2)
    ends = [SAMPLES // 2 + (SAMPLES - SAMPLES // 2) * r // (size - 1) for r in range(size)]
    return slice(ends[rank - 1], ends[rank])


def vectors() -> Tensor:
    n = sum(p.numel() for p in network().parameters())
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(43), dtype=torch.float64)


def cut(V: Tensor, rank: int, size: int) -> Tensor:
    """Return a process's slice of V [n, ...] under FSDP2: its rows of each tensor."""
    shapes = [p.shape for p in network().parameters()]
    own = []
    for piece, shape in zip(V.split([shape.numel() for shape in shapes]), shapes, strict=True):
        chunks = piece.view(*shape, *V.shape[1:]).chunk(size)
        if rank < len(chunks):
            own.append(chunks[rank].reshape(-1, *V.shape[1:]))
    return torch.cat(own) if own else V[:0]


def sharded(size: int, **options: Any) -> nn.Sequential:
    model = network()
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def hessian(rank: int, size: int, model: nn.Module, **options: Any) -> HessianOperator:
    x, target = (t[share(rank, size)] for t in samples())
    options = {"engine": "finite_difference"} | options
    return HessianOperator(model, nn.MSELoss(), (x, target), **options)


class Slices:
    """Uneven slices of a vector; the last process has none of it."""

    def __init__(self, rank: int, size: int) -> None:
        ends = [N * r * r // (size - 1) ** 2 for r in range(size)] + [N]
        self.number, self.count = rank, size
        self.own = slice(ends[rank], ends[rank + 1])
        self.length = ends[rank + 1] - ends[rank]

    def sum(self, t: Tensor) -> Tensor:
        dist.all_reduce(t)
        return t


class CutOperator:
    """A dense matrix whose rows are divided among processes."""

    dtype, device = torch.float64, torch.device("cpu")
    shape = (N, N)

    def __init__(self, rank: int, size: int) -> None:
        self.slices = Slices(rank, size)
        self.matrix = operator(decaying(N)).matrix

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        whole = V.new_zeros(N, V.shape[1])
        whole[self.slices.own] = V
        dist.all_reduce(whole)
        return self.matrix[self.slices.own] @ whole


# Scenarios: each is called with the rank and the number of processes, in all of them.


def pairs(rank: int, size: int) -> dict[str, tuple[Tensor, ...]]:
    op = CutOperator(rank, size)
    result = {}
    for which, block_size in (("LA", 1), ("BE", 3)):
        r = curvature.eigsh(op, 6, which, tol=1e-13, block_size=block_size, max_basis=24)
        again = curvature.eigsh(op, 6, which, tol=1e-13, v0=r, check_multiplicity=False)
        result[which] = r.values, r.vectors, r.residuals, r.converged, again.values
        assert r.orthogonality < 1e-13
        assert again.matvecs < r.matvecs - r.multiplicity_matvecs
    return result


def estimates(rank: int, size: int) -> dict[str, Any]:
    op = CutOperator(rank, size)
    top = curvature.eigsh(op, 10, "LM", tol=1e-10)
    density = curvature.spectral_density(op, 6, 50, deflate=top)
    diagonal = curvature.diagonal(op, 200)
    return {
        "moments": [density.moment(p).interval(0.999) for p in (1, 2, 3)],
        "trace": curvature.trace(op, 60).interval(0.999),
        "whole": curvature.trace(op, 3 * N),
        "diagonal": (diagonal.value, diagonal.standard_error),
    }


def products(rank: int, size: int) -> dict[str, Tensor]:
    V = cut(vectors(), rank, size)
    result = {}
    for name, options in {"default": {}, "gathered": {"reshard_after_forward": False}}.items():
        model = sharded(size, **options)
        if name == "gathered":
            model.set_reshard_after_backward(False)
            model(samples()[0])  # and what that gathered is stale after a move
        op = hessian(rank, size, model)
        result[name] = op.matmat(V)
        if name == "gathered":
            model(samples()[0])
        result[name + " again"] = op.matmat(V)
    model = sharded(size)
    op = hessian(rank, size, model, params=model[0].parameters(), reduction="sum")
    result["part"] = op.matmat(V[: op.slices.length])
    return result


def loaders(rank: int, size: int) -> Tensor:
    """Batches of seven: one process has three, the others fewer, and the last are smaller."""
    x, target = (t[share(rank, size)] for t in samples())
    loader = DataLoader(TensorDataset(x, target), batch_size=7)
    op = HessianOperator(sharded(size), nn.MSELoss(), loader, engine="finite_difference")
    first = op.matmat(cut(vectors(), rank, size))
    assert torch.equal(op.matmat(cut(vectors(), rank, size)), first)
    return first


def eigenpairs(rank: int, size: int) -> tuple[Tensor, Tensor]:
    result = curvature.eigsh(hessian(rank, size, sharded(size)), 3, tol=1e-6)
    return result.values, result.vectors


def replicas(rank: int, size: int) -> Tensor:
    """Two dimensions: shards along one, replicas along the other."""
    model = network()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    x, target = (t[share(rank, size)] for t in samples())
    op = HessianOperator(model, nn.MSELoss(), (x, target), engine="finite_difference")
    return op.matmat(cut(vectors(), rank % (size // 2), size // 2))


def follows(rank: int, size: int) -> tuple[Tensor, Tensor, bool]:
    """Parameters of one process change; gradients do not."""
    model = sharded(size)
    op = hessian(rank, size, model)
    V = cut(vectors(), rank, size)
    for p in op.params:
        p.grad = torch.ones_like(p)
    before = op.matmat(V)
    if rank == 0:
        with torch.no_grad():
            op.params[2].to_local().mul_(2)
    after = op.matmat(V)
    kept = all(bool((p.grad.to_local() == 1).all()) for p in op.params)
    return before, after, kept


def refusals(rank: int, size: int) -> list[str]:
    x, target = samples()
    said = []

    def attempt(run: Callable[[], object]) -> None:
        try:
            run()
            said.append("accepted")
        except (ValueError, RuntimeError) as error:
            said.append(str(error))

    model = sharded(size)
    given = {"loss_fn": nn.MSELoss(), "data": (x, target)}
    attempt(lambda: HessianOperator(model, **given))
    attempt(lambda: GGNOperator(model, **given, engine="finite_difference"))
    op = hessian(rank, size, model)
    attempt(op.to_scipy)
    attempt(lambda: op.matvec(vectors()[:, 0]))
    model.set_requires_gradient_sync(False)
    attempt(lambda: op.matmat(cut(vectors(), rank, size)))
    model.set_requires_gradient_sync(True)
    half = network()
    fully_shard(half[0], mesh=init_device_mesh("cpu", (size,)))
    attempt(lambda: hessian(rank, size, half))
    return said


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (pairs, estimates, products, loaders, eigenpairs, replicas, follows, refusals)
}


def main(rank: int, folder: str, size: int) -> None:
    """Run every scenario as one of the processes; write its result, or its traceback."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    result: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        try:
            result[name] = scenario(rank, size)
        except Exception:
            result[name] = traceback.format_exc()
    torch.save(result, Path(folder, f"{rank}.pt"))
    group.leave()
