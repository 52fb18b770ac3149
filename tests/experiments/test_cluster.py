"""Many runs on Ray: a cluster of two nodes, a worker that is killed, a node that is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eigenfilter.experiments import runs
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep.execution import execute
from eigenfilter.experiments.sweep.folders import folder_of
from experiments.test_execution import DIVERGES, LONG, SHORT
from experiments.test_train import assert_same, lines, trained

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two nodes with a CPU each."""
    reason = 'needs Ray: pip install "eigenfilter[ray]"'
    utils = pytest.importorskip("ray.cluster_utils", reason=reason)
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def at_work(folder: Path) -> int:
    """The process of this machine that writes the log of a run."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(handle) == str(folder / "log.jsonl"):
                return int(handle.parts[2])
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"nobody is at work in {folder}")


class Watch:
    """What was observed; `then` is done at the first checkpoint of "long" after step 100."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then, self.done = then, False
        self.seen: list[tuple[str, str, int, Record]] = []

    def __call__(self, name: str, kind: str, step: int, record: Record) -> None:
        self.seen.append((name, kind, step, record))
        if (name, kind) == ("long", "checkpoint") and step >= 100 and not self.done:
            self.done = True
            self.then()

    def of(self, name: str, kind: str) -> list[tuple[int, Any]]:
        return [(step, record) for n, k, step, record in self.seen if (n, k) == (name, kind)]


def check_tried_again(watch: Watch, records: dict[str, Record], out: Path, whole: Path) -> None:
    """The run went on from a checkpoint, and ended with the bits of one that was left alone."""
    assert watch.done
    [(_, retry)] = watch.of("long", "retry")
    assert retry["error"]
    (first, _), (again, _) = watch.of("long", "start")
    assert first == 0
    assert again >= 100
    assert again % 50 == 0
    assert records["long"]["outcome"] == "complete"
    runs.run(LONG, whole)
    assert_same(trained(folder_of(out, "long")), trained(whole))
    assert lines(folder_of(out, "long")) == lines(whole)


def test_runs_are_spread_and_a_killed_worker_is_replaced(nodes: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = {"long": LONG, "diverges": DIVERGES, "short": SHORT}
    watch = Watch(lambda: os.kill(at_work(folder_of(out, "long")), signal.SIGKILL))
    records = execute(chosen, out, ray=nodes.address, observe=watch)
    check_tried_again(watch, records, out, tmp_path / "whole")
    began = [record["node"] for _, kind, _, record in watch.seen if kind == "start"]
    assert len(set(began)) == 2
    assert records["diverges"]["diverged"]
    assert "the loss of step" in records["diverges"]["error"]
    assert records["short"]["outcome"] == "complete"
    seen = len(watch.seen)
    assert execute(chosen, out, ray=nodes.address, observe=watch) == records
    assert len(watch.seen) == seen  # nothing is run twice
