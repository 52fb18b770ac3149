"""Tables of results that were read from JSON: for the terminal, the result files and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.curvature.library_solvers import DEFAULTS, WITHOUT_CHECK
from benchmarks.curvature.problems import RECIPES
from benchmarks.curvature.solver_comparison import ACCURACY, LIMIT, MAX_OVERHEAD
from benchmarks.curvature.tracking import CHECKS, MAX_PRODUCTS, PROBLEM, STEPS, TOL

LEGEND = f"""The ten largest eigenvalues and their vectors, each time from scratch: building
operators and graphs and choosing an engine are part of the work. Values are checked against float64
before anything is timed; `error` is the worst relative error of the ten. If a contender has several
settings, the first that reaches {ACCURACY:g} is timed, or else the last. Memory is the high-water
mark of a process that solves once, beyond the model, the data and the libraries. Everything runs on
one thread. Times are the processor's, medians of rounds in turns, so other work on the machine
hardly counts. U is one product by double backward, on a graph built for it. `ratio` is a
contender's time over ours, with and without our check for repeated eigenvalues, which peers do
not have. It is in parentheses if the contender did not reach {ACCURACY:g}. A goal holds for both
ratios. A large problem is solved once by each contender, in that process. A contender is stopped
once it takes more than {LIMIT} times as long as ours without the check. Its times and ratios are
then lower bounds, marked with a >.
"""
COLUMNS = (
    "contender",
    "setting",
    "products",
    "error",
    "memory, MB",
    "seconds",
    "U",
    f"ratio to {DEFAULTS.name}",
    f"to {WITHOUT_CHECK.name}",
    "goal",
)
Json = Mapping[str, Any]


def all_large(names: Sequence[str]) -> bool:
    """Whether the names are those of large problems, and there is at least one."""
    return bool(names) and all(name in RECIPES and RECIPES[name].large for name in names)


def table(row: Json) -> list[str]:
    """The heading and the table of a problem."""
    unit = row["unit"]["median"]
    lines = [
        f"### {row['name']}: {row['summary']}",
        "",
        f"{row['parameters']:,} parameters; U = {1e3 * unit:.3g} ms; "
        f"{report.count(row['rounds'], 'round')}; exact values {_gap(row['gap'])}.",
        "",
        *_head(COLUMNS),
    ]
    for entry in row["entries"]:
        cells = [entry["solver"], entry["setting"], *_solution_cells(entry)]
        cells += [_at_least(entry, f"{entry['seconds']['median']:.3g}")]
        cells += [_at_least(entry, f"{entry['units']['median']:.1f}")]
        cells += [_ratio(entry, name) for name in (DEFAULTS.name, WITHOUT_CHECK.name)]
        lines.append(_line([*cells, _goal(entry)]))
    lines += [_line([line, *[""] * (len(COLUMNS) - 1)]) for line in row["absent"]]
    overhead = row["overhead"]["median"]
    lines += [
        "",
        f"Lanczos takes {overhead:.2f} times as long as its products alone, on a cached graph; "
        f"the goal of {MAX_OVERHEAD} is {_verdict(overhead <= MAX_OVERHEAD)}.",
        "",
    ]
    return lines


def tracking_table(tracks: Sequence[Json]) -> list[str]:
    """The heading and the table of tracking."""
    head = ("start", "products a check", "most", "worst error", "eigenvalue moves", "goal")
    lines = [
        f"### tracking: {RECIPES[PROBLEM].summary}",
        "",
        f"The largest eigenvalue to {TOL:g}, {CHECKS} checks, {STEPS} steps of training apart.",
        "",
        *_head(head),
    ]
    for track in tracks:
        is_met = track["products"] <= MAX_PRODUCTS
        goal = "" if track["way"] == "cold" else f"{MAX_PRODUCTS} {_verdict(is_met)}"
        cells = [track["way"], f"{track['products']:g}", track["most"], f"{track['error']:.1e}"]
        lines.append(_line([*cells, f"{track['moved']:.1%}", goal]))
    return [*lines, ""]


def _gap(gap: float | None) -> str:
    return "of one solver, not compared" if gap is None else f"agree with ARPACK's to {gap:.0e}"


def _solution_cells(entry: Json) -> list[str]:
    if _stopped(entry):
        return ["stopped", "", ""]
    memory = f"{entry['memory'] / 1e6:.3g}" if "memory" in entry else ""
    return [str(entry["products"]), f"{entry['error']:.1e}", memory]


def _stopped(entry: Json) -> bool:
    """Whether the solver was stopped; the oldest results lack this key, and memory too."""
    return bool(entry.get("stopped", False))


def _at_least(entry: Json, number: str) -> str:
    return f"> {number}" if _stopped(entry) else number


def _ratio(entry: Json, name: str) -> str:
    spread = entry["ratios"][name]
    if _stopped(entry):
        return _at_least(entry, f"{spread['median']:.2f}")
    text = f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"
    return text if entry["reached"] else f"({text})"


def _goal(entry: Json) -> str:
    if entry["goal"] is None:
        return ""
    verdicts = [spread["median"] >= entry["goal"] for spread in entry["ratios"].values()]
    if _stopped(entry):
        return f"{entry['goal']:g} {'met' if all(verdicts) else 'not judged'}"
    verdict = _verdict(all(verdicts)) if len(set(verdicts)) == 1 else "met without the check"
    return f"{entry['goal']:g} {verdict}" if entry["reached"] else f"{entry['goal']:g} not judged"


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(columns), f"|{' --- |' * len(columns)}"]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
