"""Shards that are no DTensors: each step is that of the whole model, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from optimizers import shard_workers, workers
from optimizers.shard_workers import ef, grouped

pytestmark = pytest.mark.distributed

Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of each scenario in each process."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(shard_workers.main, args=(str(folder),), nprocs=workers.WORLD)
    results = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(workers.WORLD)]
    return {name: [result[name] for result in results] for name in shard_workers.SCENARIOS}


def of(reports: Results, name: str) -> list[Any]:
    """The results of a scenario in each process; fails with its traceback if it failed in one."""
    for result in reports[name]:
        assert not isinstance(result, str), result
    return reports[name]


def alone(make: Any) -> list[torch.Tensor]:
    """Parameters after the same steps in one process on all samples."""
    model = workers.network()
    return workers.trained(make(model.parameters()), model, slice(None))


def assert_flat(actual: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """A gathered flat parameter, whose end is padding, holds the expected parameters."""
    whole = torch.cat([p.detach().flatten() for p in expected])
    torch.testing.assert_close(actual[: len(whole)], whole, rtol=1e-12, atol=1e-12)


def test_an_ascent_on_one_ranks_parameters_is_refused(reports: Results) -> None:
    for said in of(reports, "zero_refused"):
        assert len(said) == 2 * len(shard_workers.ASCENDING)
        for name, line in said.items():
            assert f"SharpnessAware({name.split()[0]}(params, optimizer_class=" in line, name


def test_an_optimizer_made_of_several_ascends(reports: Results) -> None:
    """Each has a part of the model, and the same part on every rank."""
    model = workers.network()
    opt = shard_workers.Composite(model.parameters())
    closure = workers.evaluation(opt, model, slice(None))
    for _ in range(workers.STEPS):
        closure()
        while opt.matrices.ascend():
            closure()
        opt.step()
    for result in of(reports, "composite"):
        expected = [p.detach() for p in model.parameters()]
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["set", "added", "explicit"])
def test_an_ascent_that_is_asked_for_later_is_refused(reports: Results, way: str) -> None:
    for result in of(reports, "zero_refused_later"):
        said, unchanged = result[way]
        assert "SharpnessAware(ZeroRedundancyOptimizer(params, optimizer_class=" in said
        assert unchanged


def test_clipping_on_one_ranks_parameters_is_refused(reports: Results) -> None:
    for result in of(reports, "zero_refused_later"):
        said, _ = result["clip"]
        assert "call torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)" in said


@pytest.mark.parametrize("name", ["sgd", "sgd skipping", "adamw", "usam at rho 0"])
def test_a_descent_on_one_ranks_parameters_is_right(reports: Results, name: str) -> None:
    first, second = (result[name] for result in of(reports, "zero_descends"))
    if name == "adamw":
        expected = alone(lambda params: torch.optim.AdamW(params, lr=0.05, eps=0.02))
    else:
        expected = alone(lambda params: torch.optim.SGD(params, **shard_workers.PLAIN))
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))


def test_an_ascent_around_one_that_ascends_is_refused(reports: Results) -> None:
    for result in reports["zero_of_an_ascending_one"]:
        assert "AdamW takes ascents itself" in result
        assert "wrap an optimizer that takes none" in result


def test_a_rank_without_parameters_takes_part(reports: Results) -> None:
    model = shard_workers.single()
    opt = torch.optim.SGD(model.parameters(), **shard_workers.PLAIN)
    for _ in range(workers.STEPS):
        opt.zero_grad()
        shard_workers.single_loss(model, shard_workers.INPUTS).backward()
        opt.step()
    for result in of(reports, "zero_without_parameters"):
        torch.testing.assert_close(result, [model.weight.detach()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", shard_workers.BASES)
@pytest.mark.parametrize("method", shard_workers.METHODS)
def test_every_method_around_it_is_right(reports: Results, method: str, base: str) -> None:
    first, second = (result[f"{method} {base}"] for result in of(reports, "zero_inside"))
    make, settings = shard_workers.BASES[base]
    options = {"rho": 0.15} | shard_workers.METHODS[method]
    expected = alone(lambda params: ef.SharpnessAware(make(params, **settings), method, **options))
    rounding = 1e-7 if method == "hessian_usam" else 1e-12
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("scenario", ["constructed_within_another", "post_local"])
def test_optimizers_of_all_parameters_are_not_refused(reports: Results, scenario: str) -> None:
    first, second = of(reports, scenario)
    torch.testing.assert_close(first, workers.alone(), rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", shard_workers.ELEMENTWISE)
def test_flat_shards_without_a_norm(reports: Results, name: str, original: bool) -> None:
    first, second = (result[f"{name} {original}"] for result in of(reports, "flat_elementwise"))
    assert_flat(first, alone(shard_workers.ELEMENTWISE[name]))
    assert torch.equal(first, second)


def test_several_flat_parameters(reports: Results) -> None:
    expected = workers.alone("sequential")
    for results in of(reports, "flat_nested"):
        for result in results:
            assert_flat(result, expected)


def test_flat_parameters_that_were_left_gathered(reports: Results) -> None:
    """Elements of all parameters, in whatever order the flat ones hold them."""
    expected = torch.cat([p.flatten() for p in workers.alone()]).sort().values
    for results in of(reports, "flat_forward_before_the_move"):
        assert len(results) == 4
        for result in results:
            actual = result[result != 0].sort().values  # without padding
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_flat_shards_are_restored(reports: Results) -> None:
    assert of(reports, "flat_restore") == [[True, True]] * workers.WORLD


def test_a_norm_over_flat_shards_is_refused(reports: Results) -> None:
    for said in of(reports, "flat_refused"):
        assert len(said) == 12
        for name, line in said.items():
            assert "torch.distributed.fsdp.fully_shard" in line, name


@pytest.mark.parametrize("original", [False, True])
def test_a_norm_over_flat_parameters_that_every_rank_has_whole(
    reports: Results, original: bool
) -> None:
    model = workers.network()
    opt = ef.SAM(model.parameters(), **workers.SETTINGS)
    closure = workers.evaluation(opt, model, slice(None))
    norms = []
    for _ in range(workers.STEPS):
        opt.zero_grad()
        closure()
        opt.ascend()
        closure()
        norms.append(opt.clip_grad_norm_(1e9))
        opt.step()
    for result in of(reports, "flat_and_whole"):
        actual, total = result[original]
        assert_flat(actual, list(model.parameters()))
        torch.testing.assert_close(total, torch.stack(norms), rtol=1e-12, atol=0.0)


def test_flat_parameters_of_one_rank_alone(reports: Results) -> None:
    expected = alone(lambda params: ef.SAM(params, **workers.SETTINGS))
    for result in of(reports, "flat_alone"):
        for actual in result:
            assert_flat(actual, expected)


def test_flat_shards_whose_handles_are_hidden_are_refused(reports: Results) -> None:
    for said in of(reports, "flat_frozen"):
        assert len(said) == 4
        for name, line in said.items():
            assert "call gc.unfreeze() before" in line, name


def test_clipping_flat_shards_is_their_modules_affair(reports: Results) -> None:
    model = workers.network()
    opt = ef.USAM(model.parameters(), **workers.SETTINGS)
    closure = workers.evaluation(opt, model, slice(None))
    closure()
    opt.ascend()
    closure()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for result in of(reports, "flat_clip"):
        assert all("call model.clip_grad_norm_(max_norm)" in line for line in result["said"])
        assert result[False] == pytest.approx(total, rel=1e-4)
        assert result[True] == pytest.approx(total, rel=1e-4)


def test_a_rank_without_elements_takes_part(reports: Results) -> None:
    expected = shard_workers.single_trained(
        shard_workers.single(), shard_workers.INPUTS, lambda model: model.weight
    )
    for results in of(reports, "flat_without_elements"):
        for result in results:
            assert_flat(result, [expected])


def test_a_rank_without_gradients_that_ascend_takes_part(reports: Results) -> None:
    for results in of(reports, "flat_groups"):
        for rhos, result in zip(shard_workers.GROUPS, results, strict=True):
            model = workers.network()
            opt = ef.USAM(grouped(model, *rhos), **shard_workers.PLAIN)
            assert_flat(result, workers.trained(opt, model, slice(None)))


def test_flat_shards_skip_together(reports: Results) -> None:
    for result in of(reports, "flat_skip"):
        for each in result.values():
            assert each == [(1, True), (2, True), (2, False)]


def test_a_sharded_scaler_stops_every_rank(reports: Results) -> None:
    model = workers.network()
    opt = ef.USAM(model.parameters(), **workers.SETTINGS)
    opt.step(workers.evaluation(opt, model, slice(None)))
    for results in of(reports, "flat_scaler"):
        for skipped, scale, params in results:
            assert (skipped, scale) == (1, 32.0)
            assert_flat(params, list(model.parameters()))


def test_a_scaler_of_one_rank_is_refused(reports: Results) -> None:
    for ascent, descent in of(reports, "flat_scaler_refused"):
        assert "use torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler" in ascent
        assert "call scaler.unscale_(opt)" in descent


def test_gradients_that_were_not_synchronized_are_refused(reports: Results) -> None:
    for said in of(reports, "flat_unsynchronized"):
        assert all("shape" in line for line in said)
        assert "ascend and step by synchronized ones" in said[1]


def test_gradients_that_are_placed_otherwise(reports: Results) -> None:
    expected = torch.arange(6.0, dtype=torch.float64).reshape(2, 3) - 1
    for result in of(reports, "odd_gradients"):
        assert len(result) == 12
        for name, what in result.items():
            if "s, plain" in name or "whole, plain" in name:
                assert "say how it is placed with DTensor.from_local" in what, name
            else:
                assert torch.equal(what, expected), name


def test_clipping_over_parameters_that_are_placed_in_different_ways(reports: Results) -> None:
    values = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).reshape(5, 3)
    total = (3 * (2 * values).square().sum()).sqrt().item()
    for result in of(reports, "clip_mixed"):
        assert result["total"] == pytest.approx(total, rel=1e-12)
        for g in result["grads"]:
            torch.testing.assert_close(g, 2 * values * 0.5 / (total + 1e-6), rtol=1e-12, atol=0)
