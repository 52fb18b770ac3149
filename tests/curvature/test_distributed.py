"""Two processes with unequal shares of the data multiply as one process with all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from curvature.networks import OPERATORS, dense, make
from eigenfilter.curvature import CurvatureOperator, HessianOperator, eigsh
from eigenfilter.curvature.engines import NAMES
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

CUT = 27  # the first process has 27 of 40 samples, the second 13


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(31)
    return make("partial")


def vectors() -> Tensor:
    generator = torch.Generator().manual_seed(32)
    n = sum(p.numel() for p in problem()[0].parameters() if p.requires_grad)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


def share(rank: int) -> slice:
    return slice(CUT) if rank == 0 else slice(CUT, None)


def operator(
    rank: int, kind: type[CurvatureOperator] = HessianOperator, **options: Any
) -> CurvatureOperator:
    """Return the operator over this process's share, as one batch."""
    model, x, target = problem()
    data = (x[share(rank)], target[share(rank)])
    return kind(model, nn.CrossEntropyLoss(), data, process_group=dist.group.WORLD, **options)


def refusal(op: CurvatureOperator, V: Tensor) -> str:
    try:
        op.matmat(V)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "accepted"


def products(rank: int, kind: type[CurvatureOperator], engine: str) -> Tensor:
    return operator(rank, kind, engine=engine).matmat(vectors())


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_products(run_distributed: RunDistributed, kind: Any, engine: str) -> None:
    first, second = run_distributed(products, 2, kind, engine)
    expected = OPERATORS[kind](*problem()) @ vectors()
    atol = 1e-7 if engine == "finite_difference" else 1e-12
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(first, expected, rtol=0, atol=atol)
    assert torch.equal(first, second)


def test_the_data_of_one_process_give_another_matrix() -> None:
    model, x, target = problem()
    part = share(0)
    assert (dense(model, x[part], target[part]) - dense(model, x, target)).abs().max() > 1e-2


def products_over_loaders(rank: int) -> Tensor:
    """Three batches in one process, two in the other, under DistributedDataParallel."""
    model, x, target = problem()
    data = DataLoader(TensorDataset(x[share(rank)], target[share(rank)]), batch_size=10)
    op = HessianOperator(
        DistributedDataParallel(model),
        nn.CrossEntropyLoss(),
        data,
        process_group=dist.group.WORLD,
        engine="per_pass_graph",
    )
    return op.matmat(vectors())


def test_loaders_of_unequal_length(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(products_over_loaders, 2)
    expected = dense(*problem()) @ vectors()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    assert torch.equal(first, second)


def products_of_sums(rank: int) -> Tensor:
    model, x, target = problem()
    op = HessianOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        (x[share(rank)], target[share(rank)]),
        process_group=dist.group.WORLD,
        reduction="sum",
    )
    return op.matmat(vectors())


def test_sums(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(products_of_sums, 2)
    expected = 40 * dense(*problem()) @ vectors()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-10)
    assert torch.equal(first, second)


def eigenvalues(rank: int) -> tuple[Tensor, int]:
    result = eigsh(operator(rank, engine="cached_graph"), 4, tol=1e-8)
    return result.values, result.matvecs


def test_eigenpairs(run_distributed: RunDistributed) -> None:
    (first, matvecs), (second, _) = run_distributed(eigenvalues, 2)
    model, x, target = problem()
    alone = eigsh(HessianOperator(model, nn.CrossEntropyLoss(), (x, target)), 4, tol=1e-8)
    torch.testing.assert_close(first, alone.values, rtol=0, atol=1e-12)
    assert torch.equal(first, second)
    assert matvecs == alone.matvecs


def other_parameters(rank: int) -> str:
    op = operator(rank)
    if rank:
        with torch.no_grad():
            op.params[0][0, 0] += 1e-6
    return refusal(op, vectors())


def other_vectors(rank: int) -> str:
    return refusal(operator(rank), vectors() * (1 + 1e-6 * rank))


@pytest.mark.parametrize("scenario", [other_parameters, other_vectors])
def test_processes_that_differ_raise(run_distributed: RunDistributed, scenario: Any) -> None:
    for message in run_distributed(scenario, 2):
        assert "not the same in all processes of process_group" in message


def ignored_targets(rank: int) -> list[str]:
    """In one process alone; by the number of samples, and by that of targets."""
    model, x, target = problem()
    target[3:9] = -100
    results = []
    for weight in (None, lambda batch: (batch[1] != -100).sum()):
        op = HessianOperator(
            model,
            nn.CrossEntropyLoss(),
            (x[share(rank)], target[share(rank)]),
            process_group=dist.group.WORLD,
            weight=weight,
        )
        results.append(refusal(op, vectors()))
    return results


def test_wrong_weights_in_one_process_raise_in_all(run_distributed: RunDistributed) -> None:
    (first, accepted), (second, also) = run_distributed(ignored_targets, 2)
    assert "weight=" in first
    assert "another process of process_group raised an error" in second
    assert accepted == also == "accepted"
