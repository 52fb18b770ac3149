"""Many runs at once: they are resumed, retried, reported, never repeated, and none is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from eigenfilter.experiments import runs
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep import folders, worker
from eigenfilter.experiments.sweep.execution import execute
from eigenfilter.experiments.sweep.folders import (
    RunSpec,
    failed_record,
    folder_of,
    try_folder_lock,
    write_failure,
)
from eigenfilter.experiments.sweep.progress import SweepProgress
from eigenfilter.experiments.sweep.run_queue import RunQueue
from experiments.test_train import SMALL, assert_same, lines, trainer_state

LONG = Config(**SMALL | {"epochs": 300, "evaluate_every": 100, "checkpoint_every": 50}, threads=1)
SHORT = Config(**SMALL, threads=1)
DIVERGES = Config(**SMALL | {"lr": 1e18, "optimizer": "sgd", "lr_schedule": "constant"}, threads=1)
RUNS = {"long": LONG, "diverges": DIVERGES, "short": SHORT}


def children() -> set[int]:
    """Return the child processes of this process."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def at_work(folder: Path) -> int:
    """Return the process on this machine that writes the log of a run."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(handle) == str(folder / "log.jsonl"):
                return int(handle.parts[2])
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"nobody is at work in {folder}")


@dataclass
class Watch:
    """Records events, and calls `then` at the first checkpoint of `name` after `step`."""

    name: str = ""
    step: int = 0
    then: Callable[[], object] | None = None
    events: list[tuple[str, str, int]] = field(default_factory=list)
    done: bool = False

    def __call__(self, name: str, kind: str, step: int, record: Record) -> None:
        self.events.append((name, kind, step))
        due = name == self.name and kind == "checkpoint" and step >= self.step
        if due and not self.done and self.then is not None:
            self.done = True
            self.then()

    def steps(self, name: str, kind: str) -> list[int]:
        return [step for n, k, step in self.events if (n, k) == (name, kind)]


@dataclass
class Sweep:
    """The same runs executed three times (stopped, with a kill, to the end), and their events."""

    out: Path
    records: list[dict[str, Record]]
    watches: list[Watch]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    out = tmp_path_factory.mktemp("sweep")
    write_failure(folder_of(out, "short"), failed_record(SHORT, "killed"))  # it may pass
    before = children()
    stopped = Watch("long", 100)
    stopped.then = lambda: None
    killed = Watch("long", 300)
    killed.then = lambda: os.kill(at_work(folder_of(out, "long")), signal.SIGKILL)
    watches = [stopped, killed, Watch()]
    records = [
        execute(RUNS, out, processes=1, stop=lambda: stopped.done, observe=stopped),
        execute(RUNS, out, processes=2, observe=killed),
        execute(RUNS, out, processes=2, observe=watches[2]),
    ]
    assert children() == before
    return Sweep(out, records, watches)


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_where_it_was(sweep: Sweep) -> None:
    record = sweep.records[0]["long"]
    assert record["outcome"] == "stopped"
    assert 100 <= record["step"] < 900
    assert sweep.watches[1].steps("long", "start")[0] == record["step"]


@pytest.mark.slow
def test_a_killed_process_loses_what_no_checkpoint_has_and_no_more(sweep: Sweep) -> None:
    watch = sweep.watches[1]
    assert watch.done
    assert len(watch.steps("long", "retry")) == 1
    again = watch.steps("long", "start")[1]
    assert again in watch.steps("long", "checkpoint")
    assert again >= 300
    assert sweep.records[1]["long"]["outcome"] == "complete"


@pytest.mark.slow
def test_what_was_stopped_and_killed_ends_with_the_same_bits(sweep: Sweep, tmp_path: Path) -> None:
    for name in ("long", "short"):
        runs.run(RUNS[name], tmp_path / name)
        there = folder_of(sweep.out, name)
        assert_same(trainer_state(there), trainer_state(tmp_path / name))
        assert lines(there) == lines(tmp_path / name)


@pytest.mark.slow
def test_a_run_that_diverges_is_reported_and_the_others_end(sweep: Sweep) -> None:
    assert list(sweep.records[1]) == list(RUNS)
    record = sweep.records[1]["diverges"]
    assert (record["outcome"], record["diverged"], record["attempts"]) == ("failed", True, 1)
    assert record["error"].startswith("the loss of step ")
    assert "\n" not in record["error"]
    assert record["config"] == DIVERGES.as_dict()
    assert sweep.records[1]["short"]["outcome"] == "complete"


@pytest.mark.slow
def test_nothing_is_run_twice(sweep: Sweep) -> None:
    assert [(name, kind) for name, kind, _ in sweep.watches[2].events] == [
        (n, "kept") for n in RUNS
    ]
    assert sweep.records[2] == sweep.records[1]


@pytest.mark.slow
def test_a_failure_that_may_pass_is_run_again(sweep: Sweep) -> None:
    assert sweep.watches[1].steps("short", "start") == [0]
    assert sweep.records[1]["short"]["outcome"] == "complete"


@pytest.mark.slow
def test_other_configurations_are_refused(sweep: Sweep) -> None:
    there = json.loads((folder_of(sweep.out, "short") / "results.json").read_text())
    other = Config(**SMALL | {"lr": 0.2}, threads=1)
    with pytest.raises(UserError, match=r"short contains a run with lr 0\.05, not 0\.2"):
        execute({"short": other, "new": LONG}, sweep.out)
    assert json.loads((folder_of(sweep.out, "short") / "results.json").read_text()) == there
    assert not folder_of(sweep.out, "new").exists()


def test_two_in_one_folder_are_refused(tmp_path: Path) -> None:
    with try_folder_lock(tmp_path, wait=lambda: False) as acquired:
        assert acquired
        with pytest.raises(UserError, match="another sweep is at work in "):
            execute(RUNS, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_wait_for_another_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.0)
    events = []
    with folder_lock(tmp_path, "spectrum"), SweepProgress(1) as progress:

        def observe(kind: str, step: int, record: Record) -> None:
            events.append(kind)
            progress.observe("a", kind, step, record)

        spec = RunSpec(SHORT, tmp_path, None, "cpu")
        record = folders.attempt_run(spec, stop=lambda: bool(events), observe=observe)
    assert record["outcome"] == "stopped"
    assert events == ["waiting"]
    said = f"a: another spectrum is at work in {tmp_path} (process {os.getpid()} on "
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a"])
def test_names_are_those_of_folders(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        execute({name: SHORT}, tmp_path)


def test_missing_data_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "MNIST").write_text("no folder")
    with pytest.raises(UserError, match="mnist"):
        execute({"a": Config(dataset="mnist")}, tmp_path / "out", data_dir=tmp_path / "data")


def run_queue(tmp_path: Path, retries: int, observe: Any = lambda *events: None) -> RunQueue:
    folders = {name: tmp_path / name for name in "ab"}
    specs = {name: RunSpec(SHORT, folders[name], None, "cpu") for name in folders}
    return RunQueue(specs, retries, observe)


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_process_that_ends_again_and_again_is_given_up(retries: int, tmp_path: Path) -> None:
    queue = run_queue(tmp_path, retries)
    for _ in range(retries):
        assert queue.pending.popleft() == "a"
        queue.record_crash("a", "killed")
    assert queue.pending.popleft() == "a"
    queue.record_crash("a", "killed at last")
    assert list(queue.pending) == ["b"]
    record = queue.records["a"]
    assert (record["outcome"], record["error"]) == ("failed", "killed at last")
    assert (record["diverged"], record["attempts"]) == (False, retries + 1)
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == record


def test_an_end_at_once_leaves_nobody(tmp_path: Path) -> None:
    before, during = children(), set()

    def interrupted() -> bool:
        during.update(children())
        if during > before:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        execute({"a": SHORT}, tmp_path, processes=1, stop=interrupted)
    assert children() == before


def test_what_a_run_prints_is_in_its_folder_and_nothing_after_it(tmp_path: Path) -> None:
    outputs = [os.fstat(handle) for handle in (1, 2)]
    with worker.output(tmp_path):
        os.write(1, b"one ")
        os.write(2, b"two")
    assert [os.fstat(handle) for handle in (1, 2)] == outputs
    assert (tmp_path / worker.OUTPUT).read_text() == "one two"
    with worker.output(tmp_path / "silent"):
        pass
    assert not list((tmp_path / "silent").iterdir())


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """Return the path of a folder that cannot be created."""
    (tmp_path / "nowhere").symlink_to("/proc/nowhere")
    return tmp_path / "nowhere"


def test_a_folder_that_cannot_be_written_is_the_failure_of_its_run(nowhere: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in worker.SIGNALS}
    ours, theirs = Pipe()
    try:
        ours.send(RunSpec(SHORT, nowhere, None, "cpu"))
        ours.send(None)
        worker.Worker(theirs).work()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    kind, _, record = ours.recv()
    assert (kind, record["outcome"], record["diverged"]) == ("end", "failed", False)
    assert record["error"].startswith(f"cannot write to {nowhere}: ")
    queue = RunQueue({"a": RunSpec(SHORT, nowhere, None, "cpu")}, 1, lambda *events: None)
    queue.record_end("a", record)
    assert queue.records["a"] == record | {"attempts": 1}


ENDLESS = """
from pathlib import Path
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.sweep.execution import execute
config = Config(model="mlp-12", samples=96, epochs=1_000_000, checkpoint_every=50, threads=1)
execute({{"endless": config}}, Path({out!r}), processes=1)
"""


def eventually(question: Callable[[], bool]) -> bool:
    """Wait until a condition holds, as long as a busy machine may need."""
    end = time.monotonic() + 300
    while not question() and time.monotonic() < end:
        time.sleep(0.05)
    return question()


@pytest.mark.slow
def test_a_process_ends_when_who_started_it_is_killed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "endless")
    with subprocess.Popen([sys.executable, "-c", ENDLESS.format(out=str(tmp_path))]) as started:
        try:
            assert eventually((folder / "checkpoint.pt").exists)
            at = at_work(folder)
        finally:
            started.kill()
    assert eventually(lambda: not Path(f"/proc/{at}").exists())
    record = json.loads((folder / "results.json").read_text())
    assert record["outcome"] == "stopped"
    assert trainer_state(folder)["step"] == record["step"]


def test_a_crash_while_stopping_resumes_later(tmp_path: Path) -> None:
    queue = run_queue(tmp_path, 0)
    queue.pending.popleft()
    queue.stop()
    queue.record_crash("a", "killed")
    assert {name: record["outcome"] for name, record in queue.records.items()} == {
        "a": "stopped",
        "b": "stopped",
    }
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_asked_to_end_by_others_is_replaced(tmp_path: Path) -> None:
    events: list[Any] = []
    queue = run_queue(tmp_path, 1, lambda *record: events.append(record))
    queue.pending.popleft()
    queue.record_end("a", {"outcome": "stopped", "step": 3})
    assert events == [("a", "retry", 0, {"error": "its process was asked to end"})]
    assert list(queue.pending) == ["a", "b"]
