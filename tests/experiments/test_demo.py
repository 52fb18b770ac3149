"""The demo: its measurements, its files, and its messages when an edge is not reached."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

import eigenfilter as ef
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.edge import EVERY, HOLD, at_edge, train_to_edge
from eigenfilter.experiments.full_batch import BAND, MethodSpec, SharpnessMeasurement
from eigenfilter.experiments.full_batch_data import digits
from eigenfilter.experiments.full_batch_problems import FullBatchProblem

EDGES = {
    "gradient descent": 2.0 / 0.2,
    "heavy ball": 2.0 * 1.5 / 0.2,
    "Nesterov": 3.8 / (2.8 * 0.1),
    "USAM": (math.sqrt(1.0 + 4.0 * 0.05 * 10.0) - 1.0) / (2.0 * 0.05),
}


def demo(folder: Path, *options: str) -> dict:
    assert main(["demo", "--out", str(folder), *options]) == 0
    assert (folder / "sharpness.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "results.json").read_text())


def assert_consistent(results: dict) -> None:
    assert [run["method"] for run in results["runs"]] == list(EDGES)
    for run in results["runs"]:
        last = run["history"][-1]
        assert run["edge"] == pytest.approx(EDGES[run["method"]], rel=1e-12)
        assert run["ratio"] == pytest.approx(run["sharpness"] / run["edge"], rel=1e-12)
        assert {name: run[name] for name in last} == last
        assert [check["step"] for check in run["history"]] == list(range(0, run["step"] + 1, EVERY))
        assert all(0.0 <= c["residual"] <= 1e-3 * c["sharpness"] for c in run["history"])
        assert all(check["matvecs"] > 0 for check in run["history"])


def test_a_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    results = demo(folder, "--steps", "60", "--seed", "3")
    assert_consistent(results)
    assert results["seed"] == 3
    starts = [run["history"][0] for run in results["runs"]]
    assert all(start["sharpness"] == pytest.approx(starts[0]["sharpness"]) for start in starts)
    for run in results["runs"]:
        assert run["step"] == 75
        assert run["loss"] < 0.5 * run["history"][0]["loss"]
        assert 0.5 < run["test_accuracy"] < 1.0
        assert run["outcome"] == "not at its edge: steps spent"
    text = capsys.readouterr().out
    assert text.count("not at its edge: steps spent") == 2 * len(EDGES)
    for run in results["runs"]:
        assert f"{run['sharpness']:.3f}" in text
        assert f"{run['ratio']:.3f}" in text


def test_a_spent_budget_is_reported(tmp_path: Path) -> None:
    results = demo(tmp_path, "--budget", "1e-9")
    assert_consistent(results)
    for run in results["runs"]:
        assert run["step"] == 0
        assert run["outcome"] == "not at its edge: time spent"


def test_divergence_is_reported() -> None:
    method = MethodSpec("far too fast", "lr 20", lambda p: ef.SGD(p, lr=20.0, momentum=0.9))
    events: list[int] = []
    run = train_to_edge(
        FullBatchProblem(digits(50)),
        method,
        seed=0,
        max_steps=10_000,
        deadline=time.perf_counter() + 60.0,
        on_check=lambda run: events.append(run.last.step),
    )
    assert run.outcome == "diverged"
    assert events == [check.step for check in run.history]
    assert all(math.isfinite(check.loss) for check in run.history)


def history(ratios: list[float]) -> list[SharpnessMeasurement]:
    return [
        SharpnessMeasurement(i * EVERY, 1.0, 10.0 * ratio, 10.0, 0.0, 1)
        for i, ratio in enumerate(ratios)
    ]


def test_when_a_run_is_at_its_edge() -> None:
    near = 1.0 + 0.9 * BAND
    assert at_edge(history([0.5] + [near] * HOLD))
    assert at_edge(history([1.0, 2.0 - near] + [2.0 - near] * (HOLD - 1)))
    assert not at_edge(history([near] * (HOLD - 1)))  # not for long enough
    assert not at_edge(history([2.0 - near] * (2 * HOLD)))  # never reached
    assert not at_edge(history([near] * HOLD + [1.2]))  # left again
    assert not at_edge(history([1.2] + [near] * (HOLD - 1)))


def test_the_first_sharpness_is_the_top_eigenvalue_of_the_whole_hessian() -> None:
    data = digits(60)
    problem = FullBatchProblem(data)
    run = train_to_edge(
        problem,
        MethodSpec("gradient descent", "", lambda p: ef.SGD(p, lr=0.1)),
        seed=1,
        max_steps=1,
        deadline=0.0,
        on_check=lambda run: None,
    )
    network = problem.network(seed=1)
    weights = dict(network.named_parameters())
    names, shapes = list(weights), [w.shape for w in weights.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        output = torch.func.functional_call(network, named, data.inputs)
        return ((output - torch.eye(10)[data.labels]) ** 2).sum() / len(data.inputs)

    flat = torch.cat([w.detach().flatten() for w in weights.values()]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat, create_graph=True)
    v = torch.ones_like(flat)
    for _ in range(300):
        (v,) = torch.autograd.grad(gradient, flat, v / v.norm(), retain_graph=True)
    assert run.last.sharpness == pytest.approx(float(v.norm()), rel=1e-6)


def test_digits() -> None:
    data = digits(400)
    assert data.inputs.shape == (400, 64)
    assert len(data.test_inputs) == len(data.test_labels) == 1397
    assert data.inputs.dtype == torch.float64
    assert data.inputs.mean(dim=0).abs().max() < 1e-12
    variance = data.inputs.var(dim=0, correction=0)
    assert torch.all((variance - 1.0).abs().lt(1e-9) | variance.eq(0.0))
    assert torch.equal(data.inputs, digits(400).inputs)


def test_the_network_depends_on_its_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (FullBatchProblem(digits(20)).network(seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.slow
def test_every_method_ends_at_its_edge(tmp_path: Path) -> None:
    results = demo(tmp_path)
    assert_consistent(results)
    for run in results["runs"]:
        assert run["outcome"] == "at its edge"
        assert run["ratio"] == pytest.approx(1.0, abs=0.15)
        assert run["history"][0]["sharpness"] < 0.85 * run["edge"]  # it had to climb
        assert run["train_accuracy"] > 0.99
        assert run["test_accuracy"] > 0.9
