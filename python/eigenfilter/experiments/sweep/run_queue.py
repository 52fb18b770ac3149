"""The queue of pending runs, their retries and their results."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep.folders import (
    RunSpec,
    failed_record,
    stopped_record,
    write_failure,
)

Observe = Callable[[str, str, int, Record], object]
"""A function of the name of a run, and the kind, step and values of a record."""


class RunQueue:
    """Runs in the order in which they start, with their retries and results.

    Args:
        specs: the runs by name.
        retries: number of retries of a run whose process ended.
        observe: called with each record; see `execution.execute`.

    Attributes:
        specs: the runs by name.
        pending: names of the runs that have not started, the next one first.
        records: results of the runs that ended, by name.
        observe: the function that records are passed to.
        stopping: whether no further run starts.
    """

    def __init__(self, specs: Mapping[str, RunSpec], retries: int, observe: Observe) -> None:
        self.specs, self.observe = specs, observe
        self.pending = deque(specs)
        self.records: dict[str, Record] = {}
        self.stopping = False
        self._retries = retries
        self._attempts: Counter[str] = Counter()

    def stop(self) -> None:
        """Start no further run, and record the pending ones as stopped."""
        self.stopping = True
        for name in self.pending:
            self.records[name] = stopped_record(self.specs[name].config)
        self.pending.clear()

    def record_end(self, name: str, record: Record) -> None:
        """Record the end of an attempt, or count it as a crash."""
        if record["outcome"] == "stopped" and not self.stopping:
            self.record_crash(name, "its process was asked to end")
            return
        if record.get("crashed"):
            self.record_crash(name, record["error"])
            return
        if record["outcome"] == "failed":
            record = record | {"attempts": self._attempts[name] + 1}
            with suppress(UserError):  # if it cannot be written, the next call runs it again
                write_failure(self.specs[name].folder, record)
        self.records[name] = record
        self.observe(name, "end", record.get("step", 0), record)

    def record_crash(self, name: str, error: str) -> None:
        """Retry a run whose process ended, or record its failure after the last retry.

        Args:
            name: name of the run.
            error: the reason, in one line.
        """
        config = self.specs[name].config
        if self.stopping:
            self.record_end(name, stopped_record(config))
        elif self._attempts[name] < self._retries:
            self._attempts[name] += 1
            self.pending.appendleft(name)
            self.observe(name, "retry", 0, {"error": error})
        else:
            self.record_end(name, failed_record(config, error))
