"""Results as tables, from the JSON's form of them: on the terminal, in files, on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.curvature.contest import ACCURACY, LIMIT, MOST_OVERHEAD
from benchmarks.curvature.ours import ALONE, OURS
from benchmarks.curvature.problems import RECIPES
from benchmarks.curvature.tracking import CHECKS, MOST_PRODUCTS, STEPS, TOL, TRACKED

LEGEND = f"""The ten largest eigenvalues and their vectors, each time from nothing: operators,
graphs and the choice of an engine are part of the work. Values are checked against float64 before
anything is timed; `error` is the worst relative one of the ten. Of several settings the first that
reaches {ACCURACY:g} is timed, or else the last. Memory is the high-water mark of a process that
solves once, beyond the model, the data and the libraries. Everything runs on one thread, and times
are the processor's, medians of rounds in turns: what others do on the machine hardly counts. U is
one product by double backward, on a graph built for it. `ratio` is a contender's time over ours,
with and without our check for repeated eigenvalues (peers have none); in parentheses where it did
not reach {ACCURACY:g}. A goal is for both. A large problem is solved once by each, in that process,
and whoever takes more than {LIMIT} times as long as ours without the check is stopped: its figures,
after >, are what had gone by.
"""
COLUMNS = (
    "contender",
    "setting",
    "products",
    "error",
    "memory, MB",
    "seconds",
    "U",
    f"ratio to {OURS.name}",
    f"to {ALONE.name}",
    "goal",
)
Json = Mapping[str, Any]


def large(names: Sequence[str]) -> bool:
    """Whether there are problems, and all of them are large."""
    return bool(names) and all(name in RECIPES and RECIPES[name].large for name in names)


def table(row: Json) -> list[str]:
    """A problem's heading and table."""
    raw = row["unit"]["median"]
    lines = [
        f"### {row['name']}: {row['summary']}",
        "",
        f"{row['parameters']:,} parameters; U = {1e3 * raw:.3g} ms; {row['rounds']} rounds; "
        f"reference {_gap(row['gap'])}.",
        "",
        *_head(COLUMNS),
    ]
    for entry in row["entries"]:
        cells = [entry["solver"], entry["setting"], *_found(entry)]
        cells += [_least(entry, f"{entry['seconds']['median']:.3g}")]
        cells += [_least(entry, f"{entry['units']['median']:.1f}")]
        cells += [_ratio(entry, name) for name in (OURS.name, ALONE.name)]
        lines.append(_line([*cells, _goal(entry)]))
    lines += [_line([line, *[""] * (len(COLUMNS) - 1)]) for line in row["absent"]]
    over = row["overhead"]["median"]
    lines += [
        "",
        f"Lanczos takes {over:.2f} times as long as its products alone, at raw speed on a kept "
        f"graph; the goal of {MOST_OVERHEAD} is {_verdict(over <= MOST_OVERHEAD)}.",
        "",
    ]
    return lines


def tracks(found: Sequence[Json]) -> list[str]:
    """The table of tracking."""
    head = ("start", "products a check", "most", "worst error", "eigenvalue moves", "goal")
    lines = [
        f"### tracking: {RECIPES[TRACKED].summary}",
        "",
        f"The largest eigenvalue to {TOL:g}, {CHECKS} checks, {STEPS} steps of training apart.",
        "",
        *_head(head),
    ]
    for track in found:
        met = track["products"] <= MOST_PRODUCTS
        goal = "" if track["way"] == "cold" else f"{MOST_PRODUCTS} {_verdict(met)}"
        cells = [track["way"], f"{track['products']:g}", track["most"], f"{track['error']:.1e}"]
        lines.append(_line([*cells, f"{track['moved']:.1%}", goal]))
    return [*lines, ""]


def _gap(gap: float | None) -> str:
    return "by one solver alone" if gap is None else f"{gap:.0e} from ARPACK's"


def _found(entry: Json) -> list[str]:
    if _stopped(entry):
        return ["stopped", "", ""]
    memory = f"{entry['memory'] / 1e6:.3g}" if "memory" in entry else ""
    return [str(entry["products"]), f"{entry['error']:.1e}", memory]


def _stopped(entry: Json) -> bool:
    """False in results from before anyone was; these have no memory either."""
    return bool(entry.get("stopped", False))


def _least(entry: Json, figure: str) -> str:
    return f"> {figure}" if _stopped(entry) else figure


def _ratio(entry: Json, name: str) -> str:
    spread = entry["ratios"][name]
    if _stopped(entry):
        return _least(entry, f"{spread['median']:.2f}")
    text = f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"
    return text if entry["reached"] else f"({text})"


def _goal(entry: Json) -> str:
    if entry["goal"] is None:
        return ""
    met = [spread["median"] >= entry["goal"] for spread in entry["ratios"].values()]
    if _stopped(entry):
        return f"{entry['goal']:g} {'met' if all(met) else 'not judged'}"
    verdict = _verdict(all(met)) if len(set(met)) == 1 else "met without copies"
    return f"{entry['goal']:g} {verdict}" if entry["reached"] else f"{entry['goal']:g} not judged"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(columns), f"|{' --- |' * len(columns)}"]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
