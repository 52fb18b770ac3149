"""Results as lines on the terminal, as a Markdown table and as a JSON file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import BenchmarkResult, RelativeTiming, TimingSummary
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
    "reach, counting the bytes that the work has to move. `host` is the time until the calls have "
    "returned, without waiting for the device. A CPU does the work within the calls, so there "
    "`host` is the whole time."
)


def lines(result: BenchmarkResult) -> list[str]:
    """Return a result's rows of the Markdown table.

    There is one row for each peer and reference, or one in all if the verification failed, and then
    one for each absent peer.
    """
    head = f"| {result.name} | {result.backend}"
    absent = [f"{head} | {line}{' |' * (len(COLUMNS) - 2)}" for line in result.absent]
    if result.timing is None:
        errors = ", ".join(
            f"{error:.3g} x tolerance from {peer}"
            for peer, error in result.verdict.failures.items()
        )
        return [f"{head} | FAILED, not timed: {errors}{' |' * (len(COLUMNS) - 2)}", *absent]
    timing = result.timing
    ours = f"{milliseconds(timing.seconds)} | {1e3 * timing.host.median:.3g}"
    speed = "" if timing.bandwidth is None else f"{timing.bandwidth / 1e9:.1f}"
    rows = [
        f"{head} | {ours} | {c.against} | {milliseconds(c.seconds)} | "
        f"{1e3 * c.host.median:.3g} | {ratio(c)} | {goal(c, timing)} | {speed} | {timing.rounds} |"
        for c in timing.comparisons
    ]
    return rows + absent


def milliseconds(spread: Spread) -> str:
    """A time with its quartiles."""
    low, median, high = (1e3 * s for s in (spread.low, spread.median, spread.high))
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


def ratio(comparison: RelativeTiming) -> str:
    """A ratio with its quartiles."""
    spread = comparison.ratio
    return f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def goal(comparison: RelativeTiming, timing: TimingSummary) -> str:
    """A goal and the verdict on it; empty if there is no goal."""
    if comparison.goal is None:
        return ""
    if timing.is_disturbed:
        verdict = f"not judged: other processes kept {timing.busy_cores} cores busy"
    else:
        verdict = "met" if comparison.reached else "missed"
    return f"{comparison.goal:.2f} {verdict}"


class ResultFiles:
    """The dated files of a run, Markdown and JSON, each replaced as a whole.

    They may be saved again as results come in. Then they have all that a run has measured, however
    it ends.

    Args:
        folder: the folder for the files.
        name: the part of the files' names after the date.
        environment: the environment of the run, from `environment.describe`.
    """

    def __init__(self, folder: Path, name: str, environment: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._stem = folder / f"{now:%Y-%m-%d-%H%M%S}-{name}"
        self._date = now.isoformat(timespec="seconds")
        self._environment = environment

    def save(self, text: Sequence[str], data: Mapping[str, Any]) -> None:
        """Write both files, in place of earlier ones.

        Args:
            text: lines of the Markdown file. The date and the environment follow the first line.
            data: contents of the JSON file, besides the date and the environment.
        """
        header = {"date": self._date, **self._environment}
        title, *rest = text
        contents = {"date": self._date, "environment": self._environment, **data}
        lines = [title, "", *(f"- {key}: {value}" for key, value in header.items()), *rest]
        replace_text(self._path(".json"), json.dumps(contents, indent=1) + "\n")
        replace_text(self._path(".md"), "\n".join(lines) + "\n")

    def print_paths(self) -> None:
        """Print the paths of the files."""
        for suffix in (".json", ".md"):
            print(f"wrote {self._path(suffix)}")

    def _path(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 round", "3 rounds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def incomplete(progress: int, total: int, units: str) -> list[str]:
    """The lines that say how far a run has come; none if it is complete."""
    return [] if progress == total else ["", f"Incomplete: {progress} of {total} {units} so far."]


def write(
    folder: Path,
    name: str,
    environment: Mapping[str, Any],
    text: Sequence[str],
    data: Mapping[str, Any],
) -> None:
    """Write the dated files of a run that has ended and print their paths: see `ResultFiles`."""
    files = ResultFiles(folder, name, environment)
    files.save(text, data)
    files.print_paths()
