"""Two and four processes with a slice of every vector get the results of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from curvature import sharded_workers as workers
from curvature.dense import decaying, operator, wanted
from curvature.networks import dense
from curvature.sharded_workers import cut, network, samples, vectors
from eigenfilter.curvature import HessianOperator, eigsh

pytestmark = pytest.mark.distributed

Outcomes = dict[str, list[Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The results of each scenario in all processes."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(workers.main, args=(str(folder), request.param), nprocs=request.param)
    each = [
        torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(request.param)
    ]
    return {name: [one[name] for one in each] for name in workers.SCENARIOS}


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """The Hessian of the whole data set."""
    return dense(network(), *samples(), loss_fn=nn.functional.mse_loss)


def assert_slices(outcomes: list[Tensor], expected: Tensor, atol: float = 1e-8) -> None:
    for rank, own in enumerate(outcomes):
        torch.testing.assert_close(own, cut(expected, rank, len(outcomes)), rtol=0, atol=atol)


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_eigenpairs_of_a_matrix(outcomes: Outcomes, which: str) -> None:
    """Values are equal everywhere; vectors come in slices, some of them empty."""
    op = operator(decaying(workers.N))
    expected = wanted(decaying(workers.N), 6, which)
    results = [result[which] for result in outcomes["pairs"]]
    values, _, residuals, converged, again = results[0]
    vectors = torch.cat([own for _, own, *_ in results])
    assert any(len(own) == 0 for _, own, *_ in results)
    torch.testing.assert_close(values, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(again, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6).double(), rtol=0, atol=1e-13)
    assert ((op.matrix @ vectors - vectors * values).norm(dim=0) <= residuals + 1e-12).all()
    assert converged.all()
    assert all(torch.equal(values, other) for other, *_ in results)


def test_estimates_of_a_matrix(outcomes: Outcomes) -> None:
    spectrum = decaying(workers.N).double()
    results = outcomes["estimates"]
    for result in results:
        for power, (low, high) in enumerate(result["moments"], 1):
            assert low <= spectrum.pow(power).mean() <= high
        low, high = result["trace"]
        assert low <= spectrum.sum() <= high
        assert result["whole"].value.item() == pytest.approx(spectrum.sum().item(), rel=1e-12)
    value = torch.cat([result["diagonal"][0] for result in results])
    error = torch.cat([result["diagonal"][1] for result in results])
    off = ((value - operator(decaying(workers.N)).matrix.diagonal()) / error).abs()
    assert off.max() < 5
    assert 0.5 < off.square().mean() < 2  # signs of the slices are independent


@pytest.mark.parametrize("scenario", ["default", "gathered"])
def test_products_under_fsdp(outcomes: Outcomes, exact: Tensor, scenario: str) -> None:
    for name in (scenario, f"{scenario} again"):
        assert_slices([result[name] for result in outcomes["products"]], exact @ vectors())


def test_products_equal_one_process(outcomes: Outcomes) -> None:
    """Differences with the same step agree to the rounding of gradients, 1e-15 over 3e-6."""
    alone = HessianOperator(network(), nn.MSELoss(), samples(), engine="finite_difference")
    results = [result["default"] for result in outcomes["products"]]
    assert_slices(results, alone.matmat(vectors()), atol=1e-9)


def test_a_subset_of_the_parameters(outcomes: Outcomes, exact: Tensor) -> None:
    """Sums of means of uneven shares."""
    size = len(outcomes["products"])
    x, target = samples()
    shares = [workers.share(rank, size) for rank in range(size)]
    total = sum(dense(network(), x[s], target[s], loss_fn=nn.functional.mse_loss) for s in shares)
    n = sum(p.numel() for p in network()[0].parameters())
    V = torch.zeros_like(vectors())
    V[:n] = vectors()[:n]
    expected = total @ V
    for rank, result in enumerate(outcomes["products"]):
        own = cut(expected, rank, size)[: len(result["part"])]
        torch.testing.assert_close(result["part"], own, rtol=0, atol=1e-7)


def test_loaders_of_unequal_length(outcomes: Outcomes, exact: Tensor) -> None:
    assert_slices(outcomes["loaders"], exact @ vectors())


def test_eigenpairs_under_fsdp(outcomes: Outcomes, exact: Tensor) -> None:
    alone = eigsh(HessianOperator(network(), nn.MSELoss(), samples()), 3, tol=1e-6)
    values, _ = outcomes["eigenpairs"][0]
    torch.testing.assert_close(values, alone.values, rtol=1e-6, atol=0)
    for rank, (other, own) in enumerate(outcomes["eigenpairs"]):
        assert torch.equal(other, values)
        ours = cut(alone.vectors, rank, len(outcomes["eigenpairs"]))
        torch.testing.assert_close(own.abs(), ours.abs(), rtol=0, atol=1e-3)


def test_shards_and_replicas(outcomes: Outcomes, exact: Tensor) -> None:
    size = len(outcomes["replicas"])
    for first in (0, size // 2):
        assert_slices(outcomes["replicas"][first : first + size // 2], exact @ vectors())


def test_a_change_in_one_process_raises_in_all(outcomes: Outcomes, exact: Tensor) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(2)
    changed = dense(model, *samples(), loss_fn=nn.functional.mse_loss)
    assert_slices([before for before, *_ in outcomes["follows"]], exact @ vectors())
    assert_slices([after for _, after, _ in outcomes["follows"]], changed @ vectors())
    assert all(kept for *_, kept in outcomes["follows"])


def test_unsupported_operators_of_sharded_models_raise(outcomes: Outcomes) -> None:
    for auto, ggn, scipy, whole, unsynchronized, half in outcomes["refusals"]:
        assert "engine='finite_difference'" in auto
        assert auto == ggn
        assert "SciPy needs whole vectors" in scipy
        assert "v must be [" in whole
        assert "set_requires_gradient_sync(True)" in unsynchronized
        assert "sharded all alike, or whole" in half
