"""Many runs on a Ray cluster of two nodes, with a worker that is killed and a node that is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from eigenfilter.experiments import runs
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep.execution import execute
from eigenfilter.experiments.sweep.folders import folder_of
from experiments.test_execution import DIVERGES, SHORT, at_work
from experiments.test_train import SMALL, assert_same, lines, trainer_state

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Long, because what happens is heard of half a second later.
LONG = Config(
    **SMALL | {"epochs": 1500, "evaluate_every": 500, "log_every": 500, "checkpoint_every": 50},
    threads=1,
)
RUNS = {"long": LONG, "diverges": DIVERGES, "short": SHORT}
MISSING = 'needs Ray: pip install "eigenfilter[ray]"'


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Start a cluster with a head without CPUs and two nodes with one CPU each."""
    utils = pytest.importorskip("ray.cluster_utils", reason=MISSING)
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@dataclass
class Sweep:
    """A sweep in which a run loses its worker after step 100, and its node after step 500."""

    nodes: Any
    out: Path
    records: dict[str, Record] = field(default_factory=dict)
    events: list[tuple[str, str, int, Record]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # a worker, then a node

    def observe(self, name: str, kind: str, step: int, record: Record) -> None:
        self.events.append((name, kind, step, record))
        if (name, kind) == ("long", "checkpoint"):
            if not self.lost and step >= 100:
                self.lost.append("worker")
                os.kill(at_work(folder_of(self.out, "long")), signal.SIGKILL)
            elif self.lost == ["worker"] and step >= 500:
                self.lost.append("node")
                there = self.of("long", "start")[-1][1]["node"]
                [node] = [n for n in self.nodes.list_all_nodes() if n.node_id == there]
                self.nodes.remove_node(node, allow_graceful=False)

    def of(self, name: str, kind: str) -> list[tuple[int, Any]]:
        return [(step, record) for n, k, step, record in self.events if (n, k) == (name, kind)]


@pytest.fixture(scope="module")
def sweep(nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    state = Sweep(nodes, tmp_path_factory.mktemp("cluster"))
    state.records = execute(RUNS, state.out, ray=nodes.address, retries=2, observe=state.observe)
    return state


def test_runs_are_spread_over_the_nodes(sweep: Sweep) -> None:
    began = {record["node"] for _, kind, _, record in sweep.events if kind == "start"}
    assert len(began) == 2


def test_what_is_lost_is_tried_again_from_its_checkpoint(sweep: Sweep) -> None:
    assert sweep.lost == ["worker", "node"]
    reasons = [record["error"] for _, record in sweep.of("long", "retry")]
    assert len(reasons) == 2
    assert not any("\n" in reason for reason in reasons)
    first, after_worker, after_node = [step for step, _ in sweep.of("long", "start")]
    assert first == 0
    assert after_worker >= 100
    assert after_node >= 500
    assert after_worker % 50 == after_node % 50 == 0  # where checkpoints are
    assert after_node < 4500


def test_what_was_lost_ends_with_the_same_bits(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep.records["long"]["outcome"] == "complete"
    runs.run(LONG, tmp_path)
    assert_same(trainer_state(folder_of(sweep.out, "long")), trainer_state(tmp_path))
    assert lines(folder_of(sweep.out, "long")) == lines(tmp_path)


def test_the_others_are_as_they_would_be(sweep: Sweep) -> None:
    assert sweep.records["diverges"]["diverged"]
    assert sweep.records["diverges"]["attempts"] == 1
    assert sweep.records["short"]["outcome"] == "complete"


def test_all_runs_stop_and_resume(sweep: Sweep, tmp_path: Path) -> None:
    """On the remaining node one run executes, and one waits for it to end."""
    events: list[tuple[str, str]] = []
    configs = {"long": LONG, "short": SHORT}
    records = execute(
        configs,
        tmp_path,
        ray=sweep.nodes.address,
        stop=lambda: bool(events),
        observe=lambda name, kind, step, record: events.append((name, kind)),
    )
    assert {record["outcome"] for record in records.values()} == {"stopped"}
    started = {name for name, kind in events if kind == "start"}
    assert any(records[name].get("step", 0) > 0 for name in started)
    assert all("step" not in records[name] for name in configs.keys() - started)


def test_nothing_is_run_twice(sweep: Sweep) -> None:
    events: list[Any] = []
    records = execute(RUNS, sweep.out, ray="127.0.0.1:1", observe=lambda *r: events.append(r))
    assert records == sweep.records
    assert [record[:2] for record in events] == [(name, "kept") for name in RUNS]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "cannot join the Ray cluster at 127.0.0.1:1: "),
        ("127.0.0.1:99999", "cannot join the Ray cluster at 127.0.0.1:99999: "),
        ("ray://127.0.0.1:1", "auto, local or HOST:PORT, not ray://127.0.0.1:1"),
        ("nowhere", "auto, local or HOST:PORT, not nowhere"),
    ],
)
def test_where_there_is_no_cluster(address: str, says: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason=MISSING)
    with pytest.raises(UserError, match=says):
        execute({"a": SHORT}, tmp_path, ray=address)


def test_what_no_node_has_is_one_error(sweep: Sweep, tmp_path: Path) -> None:
    for config, device, says in (
        (Config(threads=99), "auto", "a run has 99 threads, and the largest node 1 CPUs"),
        (SHORT, "cuda:1", "on a cluster the device is auto, cpu or cuda, not cuda:1"),
        (SHORT, "cuda", "no node of the cluster has a GPU"),
    ):
        with pytest.raises(UserError, match=says):
            execute({"a": config}, tmp_path, ray=sweep.nodes.address, device=device)


def test_without_ray_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "s.yaml").write_text("seeds: 2")
    argv = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--ray", "auto"]
    assert main(argv) == 2
    assert capsys.readouterr().err == (
        'eigenfilter sweep: error: ray is not installed: pip install "eigenfilter[ray]"\n'
    )
    assert not (tmp_path / "out").exists()
