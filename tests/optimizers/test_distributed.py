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

Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of each scenario in each process."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(workers.main, args=(str(folder),), nprocs=workers.WORLD)
    results = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(workers.WORLD)]
    return {name: [result[name] for result in results] for name in workers.SCENARIOS}


def of(reports: Results, name: str) -> list[Any]:
    """The results of a scenario in each process; fails with its traceback if it failed in one."""
    for result in reports[name]:
        assert not isinstance(result, str), result
    return reports[name]


@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp", "fsdp_kept_gathered", "fsdp_forward_before_the_move", "fsdp_checkpoint"],
)
def test_the_single_processs_run(reports: Results, name: str) -> None:
    first, second = of(reports, name)
    expected = alone()
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", workers.OPTIMIZERS)
@pytest.mark.parametrize("scenario", ["ddp_others", "fsdp_others"])
def test_the_single_processs_run_of_every_method(
    reports: Results, scenario: str, name: str
) -> None:
    first, second = (result[name] for result in of(reports, scenario))
    expected = alone(name)
    rounding = 1e-7 if name == "difference" else 1e-12
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["sam", "asam", "difference"])
def test_a_norm_counts_what_is_whole_once_and_sums_over_shards(reports: Results, name: str) -> None:
    first, second = (result[name] for result in of(reports, "mixed_placements"))
    expected = workers.stepped(name, lambda t: [t.clone(), t.clone(), t.clone(), t[:1], t.clone()])
    rounding = 1e-7 if name == "difference" else 1e-14
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


def test_rho_matters_in_that_run() -> None:
    """By far more than what is tolerated: a gradient at the old point would show."""
    pairs = zip(alone(), alone(rho=0.0), strict=True)
    assert min((a - b).abs().max() for a, b in pairs) > 1e-4


def test_ascents_without_synchronisation_keep_processes_together(reports: Results) -> None:
    first, second = of(reports, "ddp_local_ascent")
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, alone()))


def test_released_gradients_are_refused_before_they_are_reduced(reports: Results) -> None:
    for said in of(reports, "released"):
        assert len(said) == 2
        assert all("leave it False in a distributed job" in line for line in said)


def test_ddp_skips_together(reports: Results) -> None:
    start = [p.detach() for p in workers.network().parameters()]
    for result in of(reports, "ddp_skip"):
        assert not result["moved"]
        assert result["skipped"] == 1
        assert all(map(torch.equal, result["params"], start))


def test_fsdp_skips_together(reports: Results) -> None:
    first, second = of(reports, "fsdp_skip")
    assert first["skipped"] == second["skipped"] == [1, 2, 2]
    assert first["kept"] == second["kept"] == [True, True, False]
    assert all(map(torch.equal, first["params"], second["params"]))


def test_a_scaler_stops_every_process(reports: Results) -> None:
    first, second = of(reports, "fsdp_scaler")
    assert first["skipped"] == second["skipped"] == 1
    assert first["kept"] == second["kept"] == [True, False]
    assert first["scale"] == second["scale"] == 32.0
    assert all(map(torch.equal, first["params"], second["params"]))


def test_shards_are_restored(reports: Results) -> None:
    assert of(reports, "fsdp_restore") == [True, True]


@pytest.mark.parametrize("scenario", ["gradient_placed_otherwise", "partial_gradient"])
def test_a_gradient_placed_otherwise_is_redistributed(reports: Results, scenario: str) -> None:
    for (result,) in of(reports, scenario):
        assert torch.equal(result, torch.full_like(result, -1.0))


def test_clipping_sees_the_whole_gradient(reports: Results) -> None:
    model = workers.network()
    opt = workers.ef.USAM(model.parameters(), **workers.SETTINGS)
    closure = workers.evaluation(opt, model, slice(None))
    closure()
    opt.ascend()
    closure()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for result in of(reports, "fsdp_clip"):
        assert result["total"] == pytest.approx(total, rel=1e-10)
        assert result["clipped"] == pytest.approx(0.125, rel=1e-4)
