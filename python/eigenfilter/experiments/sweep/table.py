"""What came of a sweep: one row a configuration, means and deviations over its seeds."""

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
    """A number of a run: where it is in its record and how it is shown."""

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
    """Summaries of configurations that differ in more than their seeds, in an order of merit.

    Those that fewest runs are missing of are first, of these the best mean test accuracy: what a
    mean leaves out is seldom as good as what it has.

    Args:
        configs: by the name of the run.
        records: the results of each.

    Returns:
        A row each: `options`, those that vary among configurations (rho None where there is no
        ascent); `runs`, `complete` and
        `failed`, how many; `names`; and for every measure `mean`, `deviation` (of a sample: None
        for a single run) and `n`, over the complete runs that have it.
    """
    groups: dict[Config, list[str]] = {}
    for name, config in configs.items():
        groups.setdefault(dataclasses.replace(config, seed=0), []).append(name)
    varying = [n for n in NAMES if len({getattr(config, n) for config in groups}) > 1]
    found = [
        {"options": {name: _option(config, name) for name in varying}}
        | _summary(names, [records[name] for name in names])
        for config, names in groups.items()
    ]
    return sorted(found, key=_merit)


def cells(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows as words, under a row of heads; measures that no run has are left out."""
    options = list(table[0]["options"])
    measures = [m for m in _MEASURES if any(m.head in row["measures"] for row in table)]
    failed = ["failed"] if any(row["failed"] for row in table) else []
    percent = {"test accuracy": "test accuracy, %"}
    heads = [*options, *(percent.get(m.head, m.head) for m in measures), "runs", *failed]
    lines = [heads]
    for row in table:
        line = [_word(row["options"][name]) for name in options]
        line += [_cell(m, row["measures"].get(m.head), row["complete"]) for m in measures]
        line.append(f"{row['complete']}/{row['runs']}")
        lines.append(line + [str(row["failed"]) for _ in failed])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The rows as a table in Markdown, and how to read it."""
    return f"{markdown_table(lines)}\n\n{NOTE}\n"


def _merit(row: Mapping[str, Any]) -> tuple[int, float]:
    accuracy = row["measures"].get("test accuracy", {"mean": -math.inf})
    return row["runs"] - row["complete"], -accuracy["mean"]


def _option(config: Config, name: str) -> Any:
    return None if name == "rho" and not config.ascends else getattr(config, name)


def _word(value: object) -> str:
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
    found: Any = record
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return None if found is None else float(found)


def _cell(measure: _Measure, found: Mapping[str, Any] | None, complete: int) -> str:
    if found is None:
        return "-"
    word = measure.show(found["mean"])
    if found["deviation"] is not None:
        word += f" ± {measure.show(found['deviation'])}"
    return word if found["n"] == complete else f"{word} (n = {found['n']})"
