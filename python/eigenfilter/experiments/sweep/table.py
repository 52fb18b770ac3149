"""The table of a sweep: one row per configuration, with means and deviations over its seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eigenfilter.experiments.config import NAMES, Config
from eigenfilter.experiments.reporting import markdown_table
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep.search_space import format_value

NOTE = (
    "± is the standard deviation (of a sample) over the complete runs, (n = N) over those whose "
    "value is finite; the best row was chosen by its test accuracy, which is therefore optimistic."
)


@dataclass(frozen=True)
class _Measure:
    """A measured number: its column head, its path in the record of a run, and its format."""

    head: str
    path: tuple[str, ...]
    show: Callable[[float], str]


_MEASURES = (
    _Measure("test accuracy", ("test", "accuracy"), lambda x: f"{100 * x:.2f}"),
    _Measure("test loss", ("test", "loss"), lambda x: f"{x:.4f}"),
    _Measure("train loss", ("train", "loss"), lambda x: f"{x:.4f}"),
    _Measure("sharpness", ("sharpness", "sharpness"), lambda x: f"{x:.4g}"),
    _Measure("gradients", ("gradients",), lambda x: f"{x:.0f}"),
    _Measure("seconds", ("seconds",), lambda x: f"{x:.1f}"),
)


def rows(configs: Mapping[str, Config], records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Summarize runs that differ only in their seeds, and sort the summaries by merit.

    Rows with the fewest incomplete runs come first, and among these the highest mean test accuracy.
    Means over complete runs alone would favor rows with failures.

    Args:
        configs: configurations by the names of the runs.
        records: results by the names of the runs.

    Returns:
        The rows. Each has `options`, which vary among configurations (rho is None without an
        ascent); the numbers `runs`, `complete` and `failed`; `names`; and `measures`, each with
        `mean`, `deviation` (of a sample; None for a single run) and `n` over the complete runs
        that have it.
    """
    groups: dict[Config, list[str]] = {}
    for name, config in configs.items():
        groups.setdefault(dataclasses.replace(config, seed=0), []).append(name)
    varying = [n for n in NAMES if len({getattr(config, n) for config in groups}) > 1]
    summaries = [
        {"options": {name: _option(config, name) for name in varying}}
        | _summary(names, [records[name] for name in names])
        for config, names in groups.items()
    ]
    return sorted(summaries, key=_merit)


def cells(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows as text below a row of heads, without measures that no run has."""
    options = list(table[0]["options"])
    measures = [m for m in _MEASURES if any(m.head in row["measures"] for row in table)]
    failed = ["failed"] if any(row["failed"] for row in table) else []
    percent = {"test accuracy": "test accuracy, %"}
    heads = [*options, *(percent.get(m.head, m.head) for m in measures), "runs", *failed]
    lines = [heads]
    for row in table:
        line = [_format_option(row["options"][name]) for name in options]
        line += [_cell(m, row["measures"].get(m.head), row["complete"]) for m in measures]
        line.append(f"{row['complete']}/{row['runs']}")
        lines.append(line + [str(row["failed"]) for _ in failed])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return the rows as a Markdown table with a note."""
    return f"{markdown_table(lines)}\n\n{NOTE}\n"


def _merit(row: Mapping[str, Any]) -> tuple[int, float]:
    accuracy = row["measures"].get("test accuracy", {"mean": -math.inf})
    return row["runs"] - row["complete"], -accuracy["mean"]


def _option(config: Config, name: str) -> Any:
    return None if name == "rho" and not config.has_rho else getattr(config, name)


def _format_option(value: object) -> str:
    return "-" if value is None else format_value(value)


def _summary(names: list[str], records: list[Record]) -> dict[str, Any]:
    complete = [record for record in records if record["outcome"] == "complete"]
    measures = {}
    for measure in _MEASURES:
        values = [v for v in (_value(record, measure.path) for record in complete) if v is not None]
        if values:
            measures[measure.head] = {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
    return {
        "runs": len(records),
        "complete": len(complete),
        "failed": sum(record["outcome"] == "failed" for record in records),
        "names": names,
        "measures": measures,
    }


def _value(record: Record, path: tuple[str, ...]) -> float | None:
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else float(value)


def _cell(measure: _Measure, summary: Mapping[str, Any] | None, complete: int) -> str:
    if summary is None:
        return "-"
    text = measure.show(summary["mean"])
    if summary["deviation"] is not None:
        text += f" ± {measure.show(summary['deviation'])}"
    return text if summary["n"] == complete else f"{text} (n = {summary['n']})"
