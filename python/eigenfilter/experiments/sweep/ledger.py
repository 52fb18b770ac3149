"""Which runs wait, which are tried again, and what became of each."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep.folders import Order, failure, interrupted, keep_failure

Observe = Callable[[str, str, int, Record], object]


class Ledger:
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

    def __init__(self, orders: Mapping[str, Order], retries: int, observe: Observe) -> None:
        self.orders, self.observe = orders, observe
        self.waiting = deque(orders)
        self.records: dict[str, Record] = {}
        self.stopping = False
        self._retries = retries
        self._attempts: Counter[str] = Counter()

    def stop(self) -> None:
        """Begin nothing any more."""
        self.stopping = True
        for name in self.waiting:
            self.records[name] = interrupted(self.orders[name].config)
        self.waiting.clear()

    def ended(self, name: str, record: Record) -> None:
        """An attempt came to its end, in whatever way."""
        if record["outcome"] == "stopped" and not self.stopping:
            self.crashed(name, "its process was asked to end")
            return
        if record.get("crashed"):
            self.crashed(name, record["error"])
            return
        if record["outcome"] == "failed":
            record = record | {"attempts": self._attempts[name] + 1}
            with suppress(UserError):  # unwritten, it is told of, and run again by the next call
                keep_failure(self.orders[name].folder, record)
        self.records[name] = record
        self.observe(name, "end", record.get("step", 0), record)

    def crashed(self, name: str, error: str) -> None:
        """The process of a run ended: try again, or give up.

        Args:
            name: of the run.
            error: why, in one line.
        """
        config = self.orders[name].config
        if self.stopping:
            self.ended(name, interrupted(config))
        elif self._attempts[name] < self._retries:
            self._attempts[name] += 1
            self.waiting.appendleft(name)
            self.observe(name, "retry", 0, {"error": error})
        else:
            self.ended(name, failure(config, error))
