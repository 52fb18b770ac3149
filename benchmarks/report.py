"""Results as lines on the terminal, as a Markdown table and as JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Comparison, Result, Timing
from benchmarks.timing import Spread
from eigenfilter.experiments.files import replace_text

COLUMNS = (
    "benchmark",
    "backend",
    "ours, ms",
    "host",
    "against",
    "its, ms",
    "host",
    "ratio",
    "goal",
    "ours, GB/s",
    "rounds",
)
HEADER = (f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}")
LEGEND = (
    "Medians, with quartiles in brackets. `ratio` is the other's time over ours, round by round: "
    "above 1 we are faster. The row against `copy` is the fraction of a copy's bandwidth that we "
    "reach, counting the bytes the work has to move. `host` is the time until the calls had "
    "returned, without waiting for the device; a CPU does the work within the calls, so that there "
    "it is the whole time."
)


def lines(result: Result) -> list[str]:
    """Return a result's rows of the Markdown table.

    One without figures if its check is red, and one for each peer that is absent.
    """
    head = f"| {result.name} | {result.backend}"
    absent = [f"{head} | {line}{' |' * (len(COLUMNS) - 2)}" for line in result.absent]
    if result.timing is None:
        found = ", ".join(f"{e:.3g} x tolerance from {p}" for p, e in result.verdict.red.items())
        return [f"{head} | RED, not timed: {found}{' |' * (len(COLUMNS) - 2)}", *absent]
    timing = result.timing
    ours = f"{milliseconds(timing.seconds)} | {1e3 * timing.host.median:.3g}"
    moved = "" if timing.bandwidth is None else f"{timing.bandwidth / 1e9:.1f}"
    figures = [
        f"{head} | {ours} | {c.against} | {milliseconds(c.seconds)} | "
        f"{1e3 * c.host.median:.3g} | {ratio(c)} | {goal(c, timing)} | {moved} | {timing.rounds} |"
        for c in timing.comparisons
    ]
    return figures + absent


def milliseconds(spread: Spread) -> str:
    """A time with its quartiles."""
    low, median, high = (1e3 * s for s in (spread.low, spread.median, spread.high))
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


def ratio(comparison: Comparison) -> str:
    """A ratio with its quartiles."""
    spread = comparison.ratio
    return f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def goal(comparison: Comparison, timing: Timing) -> str:
    """A goal, and whether it was met."""
    if comparison.goal is None:
        return ""
    if timing.disturbed:
        verdict = f"not judged: others used {timing.neighbours} cores"
    else:
        verdict = "met" if comparison.reached else "missed"
    return f"{comparison.goal:.2f} {verdict}"


class Files:
    """The dated files of a run, Markdown and JSON, each in one piece.

    They may be saved again as results come: what a run has measured is then there, however it ends.

    Args:
        folder: where to.
        name: what follows the date in the files' names.
        environment: of the run.
    """

    def __init__(self, folder: Path, name: str, environment: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._stem = folder / f"{now:%Y-%m-%d-%H%M%S}-{name}"
        self._date = now.isoformat(timespec="seconds")
        self._environment = environment

    def save(self, text: Sequence[str], data: Mapping[str, Any]) -> None:
        """Write both files, in the place of those before.

        Args:
            text: lines of the Markdown file; date and environment come after the first.
            data: of the JSON file, beside date and environment.
        """
        known = {"date": self._date, **self._environment}
        title, *rest = text
        found = {"date": self._date, "environment": self._environment, **data}
        lines = [title, "", *(f"- {key}: {value}" for key, value in known.items()), *rest]
        replace_text(self._path(".json"), json.dumps(found, indent=1) + "\n")
        replace_text(self._path(".md"), "\n".join(lines) + "\n")

    def name(self) -> None:
        """Print where the files are."""
        for suffix in (".json", ".md"):
            print(f"wrote {self._path(suffix)}")

    def _path(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)


def incomplete(done: int, of: int, what: str) -> list[str]:
    """The lines that say how far a run has come; none for one that is complete."""
    return [] if done == of else ["", f"Incomplete: {done} of {of} {what} so far."]


def write(
    folder: Path,
    name: str,
    environment: Mapping[str, Any],
    text: Sequence[str],
    data: Mapping[str, Any],
) -> None:
    """Write the dated files of a run that is over, and say where they are: see `Files`."""
    files = Files(folder, name, environment)
    files.save(text, data)
    files.name()
