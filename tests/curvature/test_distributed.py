"""Two processes with unequal shares of the data multiply as one process with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from curvature import workers
from curvature.networks import OPERATORS, dense
from curvature.workers import problem, vectors
from eigenfilter.curvature import HessianOperator, eigsh
from eigenfilter.curvature.engines import NAMES

pytestmark = pytest.mark.distributed

Outcomes = dict[str, tuple[Any, Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The results of each scenario in both processes."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(workers.main, args=(str(folder),), nprocs=workers.WORLD)
    first, second = (torch.load(Path(folder, f"{rank}.pt")) for rank in range(workers.WORLD))
    return {name: (first[name], second[name]) for name in workers.SCENARIOS}


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_products(outcomes: Outcomes, kind: Any, engine: str) -> None:
    first, second = (result[kind.__name__][engine] for result in outcomes["products"])
    expected = OPERATORS[kind](*problem()) @ vectors()
    atol = 1e-7 if engine == "finite_difference" else 1e-12
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(first, expected, rtol=0, atol=atol)
    assert torch.equal(first, second)


def test_the_data_of_one_process_give_another_matrix() -> None:
    model, x, target = problem()
    part = workers.share(0)
    assert (dense(model, x[part], target[part]) - dense(model, x, target)).abs().max() > 1e-2


def test_loaders_of_unequal_length(outcomes: Outcomes) -> None:
    first, second = outcomes["loaders"]
    expected = dense(*problem()) @ vectors()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    assert torch.equal(first, second)


def test_sums(outcomes: Outcomes) -> None:
    first, second = outcomes["sums"]
    expected = 40 * dense(*problem()) @ vectors()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-10)
    assert torch.equal(first, second)


def test_eigenpairs(outcomes: Outcomes) -> None:
    (first, spent), (second, _) = outcomes["pairs"]
    model, x, target = problem()
    alone = eigsh(HessianOperator(model, nn.CrossEntropyLoss(), (x, target)), 4, tol=1e-8)
    torch.testing.assert_close(first, alone.values, rtol=0, atol=1e-12)
    assert torch.equal(first, second)
    assert spent == alone.matvecs


@pytest.mark.parametrize("scenario", ["other_parameters", "other_vectors"])
def test_processes_that_differ_raise(outcomes: Outcomes, scenario: str) -> None:
    for message in outcomes[scenario]:
        assert "not the same in all processes of process_group" in message


def test_wrong_weights_in_one_process_raise_in_all(outcomes: Outcomes) -> None:
    (first, accepted), (second, also) = outcomes["ignored_targets"]
    assert "weight=" in first
    assert "another process of process_group raised an error" in second
    assert accepted == also == "accepted"
