"""How far a sweep is: a bar over its runs, and a line for each that ends."""

from __future__ import annotations

from tqdm import tqdm

from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.train import summary


class SweepProgress:
    """What the terminal shows of a sweep.

    Args:
        total: the number of runs, those that need not be run included, or of whatever else the bar
            counts besides.
        unit: of the bar.

    Attributes:
        bar: for what `observe` does not tell.
    """

    def __init__(self, total: int, unit: str = " runs") -> None:
        self.bar = tqdm(total=total, unit=unit, leave=False, disable=None)
        self._steps: dict[str, tuple[int, int]] = {}  # taken, and of how many, of those at work

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
                self.bar.write(f"{name}: {_words(record)}")
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
        self.bar.set_postfix_str(f"{len(self._steps)} at work, {parts:.1f} done", refresh=False)
        self.bar.update(0)


def _words(record: Record) -> str:
    return summary(record) if record["outcome"] == "complete" else f"failed: {record['error']}"
