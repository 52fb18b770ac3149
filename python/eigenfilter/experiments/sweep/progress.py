"""Progress of a sweep: a bar over its runs, and a line for each run that ends."""

from __future__ import annotations

from tqdm import tqdm

from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.train import summary


class SweepProgress:
    """The progress bar of a sweep.

    Args:
        total: number of units that the bar counts, which include runs that are already finished.
        unit: name of the unit.

    Attributes:
        bar: the bar, to count units other than runs.
    """

    def __init__(self, total: int, unit: str = " runs") -> None:
        self.bar = tqdm(total=total, unit=unit, leave=False, disable=None)
        self._steps: dict[str, tuple[int, int]] = {}  # steps taken and in total, of active runs

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def observe(self, name: str, kind: str, step: int, record: Record) -> None:
        """Show a record of a run."""
        if kind == "kept":
            self.bar.update()
        elif kind == "end":
            self._steps.pop(name, None)
            if record["outcome"] != "stopped":
                self.bar.write(f"{name}: {_summary(record)}")
                self.bar.update()
        elif kind == "waiting":
            self.bar.write(f"{name}: {record['holder']}; waiting for it to end")
        elif kind == "retry":
            self._steps.pop(name, None)
            self.bar.write(f"{name}: {record['error']}; trying again")
        elif kind == "start":
            self._steps[name] = (step, record["total"])
        elif name in self._steps:
            self._steps[name] = (step, self._steps[name][1])
        parts = sum(taken / total for taken, total in self._steps.values())
        self.bar.set_postfix_str(f"{len(self._steps)} active, {parts:.1f} done", refresh=False)
        self.bar.update(0)


def _summary(record: Record) -> str:
    return summary(record) if record["outcome"] == "complete" else f"failed: {record['error']}"
