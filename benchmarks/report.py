"""Results as lines on the terminal, as a Markdown table and as JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eigenfilter.benchmarks.measure import Comparison, Result, Timing
from eigenfilter.benchmarks.timing import Spread

HEADER = (
    "| benchmark | backend | ours, ms | against | its, ms | ratio | goal | ours, GB/s | rounds |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
LEGEND = (
    "Medians, with quartiles in brackets. `ratio` is the other's time over ours, round by round: "
    "above 1 we are faster. The row against `copy` is the fraction of a copy's bandwidth that we "
    "reach, counting the bytes the work has to move."
)


def lines(result: Result) -> list[str]:
    """Return a result's rows of the Markdown table: one without figures if its check is red."""
    head = f"| {result.name} | {result.backend}"
    if result.timing is None:
        found = ", ".join(f"{e:.3g} x tolerance from {p}" for p, e in result.verdict.red.items())
        return [f"{head} | RED, not timed: {found} | | | | | | |"]
    timing = result.timing
    ours = milliseconds(timing.seconds)
    return [
        f"{head} | {ours} | {c.against} | {milliseconds(c.seconds)} | {ratio(c)} | "
        f"{goal(c, timing)} | {timing.bandwidth / 1e9:.1f} | {timing.rounds} |"
        for c in timing.comparisons
    ]


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


def write(
    folder: Path,
    name: str,
    environment: Mapping[str, Any],
    text: Sequence[str],
    data: Mapping[str, Any],
) -> None:
    """Write the dated files of a run, and say where they are.

    Args:
        folder: where to.
        name: what follows the date in the files' names.
        environment: of the run.
        text: lines of the Markdown file; date and environment come after the first.
        data: of the JSON file, beside date and environment.
    """
    now = datetime.datetime.now(datetime.UTC)
    stem = folder / f"{now:%Y-%m-%d-%H%M%S}-{name}"
    date = now.isoformat(timespec="seconds")
    facts = [f"- {key}: {value}" for key, value in {"date": date, **environment}.items()]
    title, *rest = text
    found = {"date": date, "environment": environment, **data}
    contents = {
        ".json": json.dumps(found, indent=1),
        ".md": "\n".join([title, "", *facts, *rest]),
    }
    for suffix, content in contents.items():
        path = stem.with_name(stem.name + suffix)
        path.write_text(content + "\n")
        print(f"wrote {path}")
