"""Which runs wait, which are tried again, and what became of each."""

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


class RunQueue:
    """The book of all runs.

    Args:
        orders: by name.
        retries: how often a run is tried again after its process ended.
        observe: gets name, kind, step and values.

    Attributes:
        orders: as given.
        waiting: names, those to be run next first.
        records: of those that ended.
        observe: as given.
        stopping: whether nothing is begun any more.
    """

    def __init__(self, specs: Mapping[str, RunSpec], retries: int, observe: Observe) -> None:
        self.specs, self.observe = specs, observe
        self.pending = deque(specs)
        self.records: dict[str, Record] = {}
        self.stopping = False
        self._retries = retries
        self._attempts: Counter[str] = Counter()

    def stop(self) -> None:
        """Begin nothing any more."""
        self.stopping = True
        for name in self.pending:
            self.records[name] = stopped_record(self.specs[name].config)
        self.pending.clear()

    def record_end(self, name: str, record: Record) -> None:
        """An attempt came to its end, in whatever way."""
        if record["outcome"] == "stopped" and not self.stopping:
            self.record_crash(name, "its process was asked to end")
            return
        if record.get("crashed"):
            self.record_crash(name, record["error"])
            return
        if record["outcome"] == "failed":
            record = record | {"attempts": self._attempts[name] + 1}
            with suppress(UserError):  # unwritten, it is told of, and run again by the next call
                write_failure(self.specs[name].folder, record)
        self.records[name] = record
        self.observe(name, "end", record.get("step", 0), record)

    def record_crash(self, name: str, error: str) -> None:
        """The process of a run ended: try again, or give up.

        Args:
            name: of the run.
            error: why, in one line.
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
