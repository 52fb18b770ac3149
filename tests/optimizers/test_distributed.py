"""DDP and FSDP2 in two processes are the single process's run, and skip together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from optimizers import workers
from optimizers.workers import alone

pytestmark = pytest.mark.distributed

Found = dict[str, list[Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each scenario found in each process."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(workers.main, args=(str(folder),), nprocs=workers.WORLD)
    results = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(workers.WORLD)]
    return {name: [result[name] for result in results] for name in workers.SCENARIOS}


def of(found: Found, name: str) -> list[Any]:
    """What a scenario found in each process; fails with its traceback if it failed in one."""
    for result in found[name]:
        assert not isinstance(result, str), result
    return found[name]


@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp", "fsdp_kept_gathered", "fsdp_forward_before_the_move", "fsdp_checkpoint"],
)
def test_the_single_processs_run(found: Found, name: str) -> None:
    first, second = of(found, name)
    expected = alone()
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", workers.OPTIMIZERS)
@pytest.mark.parametrize("scenario", ["ddp_others", "fsdp_others"])
def test_the_single_processs_run_of_every_method(found: Found, scenario: str, name: str) -> None:
    first, second = (result[name] for result in of(found, scenario))
    expected = alone(name)
    rounding = 1e-7 if name == "difference" else 1e-12
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["sam", "asam", "difference"])
def test_a_norm_counts_what_is_whole_once_and_sums_over_shards(found: Found, name: str) -> None:
    first, second = (result[name] for result in of(found, "mixed_placements"))
    expected = workers.stepped(name, lambda t: [t.clone(), t.clone(), t.clone(), t[:1], t.clone()])
    rounding = 1e-7 if name == "difference" else 1e-14
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


def test_rho_matters_in_that_run() -> None:
    """By far more than what is tolerated: a gradient at the old point would show."""
    pairs = zip(alone(), alone(rho=0.0), strict=True)
    assert min((a - b).abs().max() for a, b in pairs) > 1e-4


def test_ascents_without_synchronisation_keep_processes_together(found: Found) -> None:
    first, second = of(found, "ddp_local_ascent")
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, alone()))


def test_released_gradients_are_refused_before_they_are_reduced(found: Found) -> None:
    for said in of(found, "released"):
        assert len(said) == 2
        assert all("leave it False in a distributed job" in line for line in said)


def test_ddp_skips_together(found: Found) -> None:
    start = [p.detach() for p in workers.network().parameters()]
    for result in of(found, "ddp_skip"):
        assert not result["moved"]
        assert result["skipped"] == 1
        assert all(map(torch.equal, result["params"], start))


def test_fsdp_skips_together(found: Found) -> None:
    first, second = of(found, "fsdp_skip")
    assert first["skipped"] == second["skipped"] == [1, 2, 2]
    assert first["kept"] == second["kept"] == [True, True, False]
    assert all(map(torch.equal, first["params"], second["params"]))


def test_a_scaler_stops_every_process(found: Found) -> None:
    first, second = of(found, "fsdp_scaler")
    assert first["skipped"] == second["skipped"] == 1
    assert first["kept"] == second["kept"] == [True, False]
    assert first["scale"] == second["scale"] == 32.0
    assert all(map(torch.equal, first["params"], second["params"]))


def test_shards_are_restored(found: Found) -> None:
    assert of(found, "fsdp_restore") == [True, True]


@pytest.mark.parametrize("scenario", ["gradient_placed_otherwise", "partial_gradient"])
def test_a_gradient_placed_otherwise_is_redistributed(found: Found, scenario: str) -> None:
    for (result,) in of(found, scenario):
        assert torch.equal(result, torch.full_like(result, -1.0))


def test_clipping_sees_the_whole_gradient(found: Found) -> None:
    model = workers.network()
    opt = workers.ef.USAM(model.parameters(), **workers.SETTINGS)
    closure = workers.evaluation(opt, model, slice(None))
    closure()
    opt.ascend()
    closure()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for result in of(found, "fsdp_clip"):
        assert result["total"] == pytest.approx(total, rel=1e-10)
        assert result["clipped"] == pytest.approx(0.125, rel=1e-4)
