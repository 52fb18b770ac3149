"""Many runs on Ray: a cluster of two nodes, a worker that is killed, a node that is lost."""

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
from experiments.test_train import SMALL, assert_same, lines, trained

pytestmark = pytest.mark.distributed

# Long, because what happens is heard of half a second later.
LONG = Config(
    **SMALL | {"epochs": 1500, "evaluate_every": 500, "log_every": 500, "checkpoint_every": 50},
    threads=1,
)
RUNS = {"long": LONG, "diverges": DIVERGES, "short": SHORT}
MISSING = 'needs Ray: pip install "eigenfilter[ray]"'


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster whose head leaves the work to two nodes with a CPU each."""
    utils = pytest.importorskip("ray.cluster_utils", reason=MISSING)
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@dataclass
class Swept:
    """Runs one of which loses its worker after step 100, and its node after step 500."""

    nodes: Any
    out: Path
    records: dict[str, Record] = field(default_factory=dict)
    seen: list[tuple[str, str, int, Record]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # a worker, then a node

    def observe(self, name: str, kind: str, step: int, record: Record) -> None:
        self.seen.append((name, kind, step, record))
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
        return [(step, record) for n, k, step, record in self.seen if (n, k) == (name, kind)]


@pytest.fixture(scope="module")
def swept(nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    found = Swept(nodes, tmp_path_factory.mktemp("cluster"))
    found.records = execute(RUNS, found.out, ray=nodes.address, retries=2, observe=found.observe)
    return found


def test_runs_are_spread_over_the_nodes(swept: Swept) -> None:
    began = {record["node"] for _, kind, _, record in swept.seen if kind == "start"}
    assert len(began) == 2


def test_what_is_lost_is_tried_again_from_its_checkpoint(swept: Swept) -> None:
    assert swept.lost == ["worker", "node"]
    reasons = [record["error"] for _, record in swept.of("long", "retry")]
    assert len(reasons) == 2
    assert not any("\n" in reason for reason in reasons)
    first, after_worker, after_node = [step for step, _ in swept.of("long", "start")]
    assert first == 0
    assert after_worker >= 100
    assert after_node >= 500
    assert after_worker % 50 == after_node % 50 == 0  # where checkpoints are
    assert after_node < 4500


def test_what_was_lost_ends_with_the_same_bits(swept: Swept, tmp_path: Path) -> None:
    assert swept.records["long"]["outcome"] == "complete"
    runs.run(LONG, tmp_path)
    assert_same(trained(folder_of(swept.out, "long")), trained(tmp_path))
    assert lines(folder_of(swept.out, "long")) == lines(tmp_path)


def test_the_others_are_as_they_would_be(swept: Swept) -> None:
    assert swept.records["diverges"]["diverged"]
    assert swept.records["diverges"]["attempts"] == 1
    assert swept.records["short"]["outcome"] == "complete"


def test_all_are_stopped_and_gone_on_with(swept: Swept, tmp_path: Path) -> None:
    """On the node that is left: one run is at work, and one waits for room."""
    seen: list[tuple[str, str]] = []
    chosen = {"long": LONG, "short": SHORT}
    records = execute(
        chosen,
        tmp_path,
        ray=swept.nodes.address,
        stop=lambda: bool(seen),
        observe=lambda name, kind, step, record: seen.append((name, kind)),
    )
    assert {record["outcome"] for record in records.values()} == {"stopped"}
    [began] = {name for name, kind in seen if kind == "start"}
    assert records[began]["step"] > 0
    assert "step" not in records["short" if began == "long" else "long"]


def test_nothing_is_run_twice(swept: Swept) -> None:
    seen: list[Any] = []
    records = execute(RUNS, swept.out, ray="127.0.0.1:1", observe=lambda *r: seen.append(r))
    assert records == swept.records
    assert [record[:2] for record in seen] == [(name, "kept") for name in RUNS]


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


def test_what_no_node_has_is_one_error(swept: Swept, tmp_path: Path) -> None:
    for config, device, says in (
        (Config(threads=99), "auto", "a run has 99 threads, and the largest node 1 CPUs"),
        (SHORT, "cuda:1", "on a cluster the device is auto, cpu or cuda, not cuda:1"),
        (SHORT, "cuda", "no node of the cluster has a GPU"),
    ):
        with pytest.raises(UserError, match=says):
            execute({"a": config}, tmp_path, ray=swept.nodes.address, device=device)


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
