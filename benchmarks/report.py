"""Results as lines on the terminal, as a Markdown table and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Comparison, Result, Timing
from benchmarks.timing import Spread

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


def markdown(environment: dict[str, Any], results: Sequence[Result]) -> str:
    """Return the report of a run."""
    facts = [f"- {name}: {value}" for name, value in environment.items()]
    rows = [line for result in results for line in lines(result)]
    return "\n".join(["# Benchmarks", "", *facts, "", LEGEND, "", *HEADER, *rows, ""])


def write(
    folder: Path, device: str, environment: dict[str, Any], results: Sequence[Result]
) -> tuple[Path, Path]:
    """Write the dated JSON and Markdown files of a run; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    stem = folder / f"{now:%Y-%m-%d-%H%M%S}-{device}"
    found = {
        "date": now.isoformat(timespec="seconds"),
        "environment": environment,
        "results": [dataclasses.asdict(result) for result in results],
    }
    data, table = stem.with_suffix(".json"), stem.with_suffix(".md")
    data.write_text(json.dumps(found, indent=1) + "\n")
    table.write_text(markdown({"date": found["date"], **environment}, results))
    return data, table
