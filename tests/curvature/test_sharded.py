"""Two and four processes with a slice of every vector get the results of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from curvature.dense import decaying, operator, wanted
from curvature.networks import dense
from curvature.sharded_problem import network, samples, share
from eigenfilter import curvature
from eigenfilter.curvature import GGNOperator, HessianOperator, eigsh
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

N = 130


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def size(request: pytest.FixtureRequest) -> int:
    """The number of processes."""
    n: int = request.param
    return n


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """The Hessian of the whole data set."""
    return dense(network(), *samples(), loss_fn=nn.functional.mse_loss)


class Slices:
    """Uneven slices of a vector; the last process has none of it."""

    def __init__(self, rank: int) -> None:
        size = dist.get_world_size()
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

    def __init__(self, rank: int) -> None:
        self.slices = Slices(rank)
        self.matrix = operator(decaying(N)).matrix

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        whole = V.new_zeros(N, V.shape[1])
        whole[self.slices.own] = V
        dist.all_reduce(whole)
        return self.matrix[self.slices.own] @ whole


def pairs(rank: int, which: str, block_size: int) -> tuple[Tensor, ...]:
    op = CutOperator(rank)
    r = curvature.eigsh(op, 6, which, tol=1e-13, block_size=block_size, max_basis=24)
    again = curvature.eigsh(op, 6, which, tol=1e-13, v0=r, check_multiplicity=False)
    assert r.orthogonality < 1e-13
    assert again.matvecs < r.matvecs - r.multiplicity_matvecs
    return r.values, r.vectors, r.residuals, r.converged, again.values


@pytest.mark.parametrize(("which", "block_size"), [("LA", 1), ("BE", 3)], ids=["LA", "BE"])
def test_eigenpairs_of_a_matrix(
    run_distributed: RunDistributed, size: int, which: str, block_size: int
) -> None:
    """Values are equal everywhere; vectors come in slices, some of them empty."""
    op = operator(decaying(N))
    expected = wanted(decaying(N), 6, which)
    results = run_distributed(pairs, size, which, block_size)
    values, _, residuals, converged, again = results[0]
    vectors = torch.cat([own for _, own, *_ in results])
    assert any(len(own) == 0 for _, own, *_ in results)
    torch.testing.assert_close(values, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(again, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6).double(), rtol=0, atol=1e-13)
    assert ((op.matrix @ vectors - vectors * values).norm(dim=0) <= residuals + 1e-12).all()
    assert converged.all()
    assert all(torch.equal(values, other) for other, *_ in results)


def estimates(rank: int) -> dict[str, Any]:
    op = CutOperator(rank)
    top = curvature.eigsh(op, 10, "LM", tol=1e-10)
    density = curvature.spectral_density(op, 6, 50, deflate=top)
    diagonal = curvature.diagonal(op, 200)
    return {
        "moments": [density.moment(p).interval(0.999) for p in (1, 2, 3)],
        "trace": curvature.trace(op, 60).interval(0.999),
        "whole": curvature.trace(op, 3 * N),
        "diagonal": (diagonal.value, diagonal.standard_error),
    }


def test_estimates_of_a_matrix(run_distributed: RunDistributed, size: int) -> None:
    spectrum = decaying(N).double()
    results = run_distributed(estimates, size)
    for result in results:
        for power, (low, high) in enumerate(result["moments"], 1):
            assert low <= spectrum.pow(power).mean() <= high
        low, high = result["trace"]
        assert low <= spectrum.sum() <= high
        assert result["whole"].value.item() == pytest.approx(spectrum.sum().item(), rel=1e-12)
    value = torch.cat([result["diagonal"][0] for result in results])
    error = torch.cat([result["diagonal"][1] for result in results])
    off = ((value - operator(decaying(N)).matrix.diagonal()) / error).abs()
    assert off.max() < 5
    assert 0.5 < off.square().mean() < 2  # signs of the slices are independent


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


def assert_slices(results: list[Tensor], expected: Tensor, atol: float = 1e-8) -> None:
    for rank, own in enumerate(results):
        torch.testing.assert_close(own, cut(expected, rank, len(results)), rtol=0, atol=atol)


def own_vectors(rank: int) -> Tensor:
    return cut(vectors(), rank, dist.get_world_size())


def own_samples(rank: int) -> tuple[Tensor, Tensor]:
    part = share(rank, dist.get_world_size())
    x, target = samples()
    return x[part], target[part]


def sharded(**options: Any) -> nn.Sequential:
    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def hessian(rank: int, model: nn.Module, **options: Any) -> HessianOperator:
    options = {"engine": "finite_difference"} | options
    return HessianOperator(model, nn.MSELoss(), own_samples(rank), **options)


def products(rank: int) -> tuple[Tensor, Tensor]:
    op = hessian(rank, sharded())
    return op.matmat(own_vectors(rank)), op.matmat(own_vectors(rank))


def products_of_gathered(rank: int) -> tuple[Tensor, Tensor]:
    """Forward passes gather parameters, and these copies are stale after an ascent."""
    model = sharded(reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    model(samples()[0])
    op = hessian(rank, model)
    first = op.matmat(own_vectors(rank))
    model(samples()[0])
    return first, op.matmat(own_vectors(rank))


@pytest.mark.parametrize("scenario", [products, products_of_gathered], ids=["default", "gathered"])
def test_products_under_fsdp(
    run_distributed: RunDistributed, size: int, exact: Tensor, scenario: Any
) -> None:
    for results in zip(*run_distributed(scenario, size), strict=True):
        assert_slices(results, exact @ vectors())


def test_products_equal_one_process(run_distributed: RunDistributed, size: int) -> None:
    """Differences with the same step agree to the rounding of gradients, 1e-15 over 3e-6."""
    alone = HessianOperator(network(), nn.MSELoss(), samples(), engine="finite_difference")
    results = [first for first, _ in run_distributed(products, size)]
    assert_slices(results, alone.matmat(vectors()), atol=1e-9)


def products_of_a_layer(rank: int) -> Tensor:
    model = sharded()
    op = hessian(rank, model, params=model[0].parameters(), reduction="sum")
    return op.matmat(own_vectors(rank)[: op.slices.length])


def test_a_subset_of_the_parameters(
    run_distributed: RunDistributed, size: int, exact: Tensor
) -> None:
    """Sums of means of uneven shares."""
    x, target = samples()
    shares = [share(rank, size) for rank in range(size)]
    total = sum(dense(network(), x[s], target[s], loss_fn=nn.functional.mse_loss) for s in shares)
    n = sum(p.numel() for p in network()[0].parameters())
    V = torch.zeros_like(vectors())
    V[:n] = vectors()[:n]
    expected = total @ V
    for rank, result in enumerate(run_distributed(products_of_a_layer, size)):
        own = cut(expected, rank, size)[: len(result)]
        torch.testing.assert_close(result, own, rtol=0, atol=1e-7)


def products_over_loaders(rank: int) -> Tensor:
    """Batches of seven: one process has three, the others fewer, and the last are smaller."""
    loader = DataLoader(TensorDataset(*own_samples(rank)), batch_size=7)
    op = HessianOperator(sharded(), nn.MSELoss(), loader, engine="finite_difference")
    first = op.matmat(own_vectors(rank))
    assert torch.equal(op.matmat(own_vectors(rank)), first)
    return first


def test_loaders_of_unequal_length(
    run_distributed: RunDistributed, size: int, exact: Tensor
) -> None:
    assert_slices(run_distributed(products_over_loaders, size), exact @ vectors())


def eigenpairs(rank: int) -> tuple[Tensor, Tensor]:
    result = curvature.eigsh(hessian(rank, sharded()), 3, tol=1e-6)
    return result.values, result.vectors


def test_eigenpairs_under_fsdp(run_distributed: RunDistributed, size: int) -> None:
    results = run_distributed(eigenpairs, size)
    alone = eigsh(HessianOperator(network(), nn.MSELoss(), samples()), 3, tol=1e-6)
    values, _ = results[0]
    torch.testing.assert_close(values, alone.values, rtol=1e-6, atol=0)
    for rank, (other, own) in enumerate(results):
        assert torch.equal(other, values)
        ours = cut(alone.vectors, rank, size)
        torch.testing.assert_close(own.abs(), ours.abs(), rtol=0, atol=1e-3)


def products_of_replicas(rank: int) -> Tensor:
    """Two dimensions: shards along one, replicas along the other."""
    model, half = network(), dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return hessian(rank, model).matmat(cut(vectors(), rank % half, half))


def test_shards_and_replicas(run_distributed: RunDistributed, size: int, exact: Tensor) -> None:
    results = run_distributed(products_of_replicas, size)
    for replica in (results[: size // 2], results[size // 2 :]):
        assert_slices(replica, exact @ vectors())


def products_around_a_change(rank: int) -> tuple[Tensor, Tensor, bool]:
    """Parameters of one process change; gradients do not."""
    op = hessian(rank, sharded())
    for p in op.params:
        p.grad = torch.ones_like(p)
    before = op.matmat(own_vectors(rank))
    if rank == 0:
        with torch.no_grad():
            op.params[2].to_local().mul_(2)
    after = op.matmat(own_vectors(rank))
    return before, after, all(bool((p.grad.to_local() == 1).all()) for p in op.params)


def test_a_change_in_one_process_is_seen_by_all(
    run_distributed: RunDistributed, size: int, exact: Tensor
) -> None:
    results = run_distributed(products_around_a_change, size)
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(2)
    changed = dense(model, *samples(), loss_fn=nn.functional.mse_loss)
    assert_slices([before for before, *_ in results], exact @ vectors())
    assert_slices([after for _, after, _ in results], changed @ vectors())
    assert all(unchanged for *_, unchanged in results)


def refusals(rank: int) -> list[str]:
    messages = []

    def attempt(run: Callable[[], object]) -> None:
        try:
            run()
            messages.append("accepted")
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))

    model = sharded()
    inputs = {"loss_fn": nn.MSELoss(), "data": samples()}
    attempt(lambda: HessianOperator(model, **inputs))
    attempt(lambda: GGNOperator(model, **inputs, engine="finite_difference"))
    op = hessian(rank, model)
    attempt(op.to_scipy)
    attempt(lambda: op.matvec(vectors()[:, 0]))
    model.set_requires_gradient_sync(False)
    attempt(lambda: op.matmat(own_vectors(rank)))
    model.set_requires_gradient_sync(True)
    half = network()
    fully_shard(half[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    attempt(lambda: hessian(rank, half))
    return messages


def test_unsupported_operators_of_sharded_models_raise(
    run_distributed: RunDistributed, size: int
) -> None:
    for auto, ggn, scipy, whole, unsynchronized, half in run_distributed(refusals, size):
        assert "engine='finite_difference'" in auto
        assert auto == ggn
        assert "SciPy needs whole vectors" in scipy
        assert "v must be [" in whole
        assert "set_requires_gradient_sync(True)" in unsynchronized
        assert "sharded all alike, or whole" in half
