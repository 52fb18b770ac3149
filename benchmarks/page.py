"""The page of results: a Markdown page with figures, from files that `eigenfilter bench` wrote.

Writes benchmarks.md and figures/*.png. The files may hold timings, memory, curvature and costs of
launches, from any devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import figures, host, report
from benchmarks.comparison import TOLERANCES
from benchmarks.curvature import tables as curvature
from benchmarks.figures import Bar, Panel, Scale
from benchmarks.former_names import with_current_names
from benchmarks.kernels import KERNELS
from benchmarks.measure import MAX_BUSY_CORES
from benchmarks.methods import METHODS
from benchmarks.networks import NETWORKS
from benchmarks.optimizers import MODELS
from benchmarks.training import GRADIENTS, METHODS_BY_NETWORK
from benchmarks.verify import REPETITIONS

Rows = Mapping[str, Mapping[str, Any]]
"""Results of one device and backend, as they are in the JSON, by name."""

INTRODUCTION = f"""# Benchmarks

`eigenfilter bench page` writes this page from the files named below. `eigenfilter bench` measures
again.

- Every row is verified before it is timed: after {REPETITIONS} repetitions from the same start,
  the library and its peers agree on parameters and state, to the tolerance in the files. A row
  whose results do not agree is not timed.
- They are then timed in turns, A B C, B C A, in one process. A ratio is the other's time over ours,
  round by round: above 1 we are faster. Bars are medians, whiskers quartiles, black marks goals.
- A goal is not judged if other processes kept more than {MAX_BUSY_CORES} cores busy meanwhile.
"""

PEERS = """The peers: *common SAM* is the recipe that is widely copied into training code: clone the
parameters, add the perturbation, restore the clone, call torch's optimizer. *foreach SAM* is the
same with torch's multi-tensor functions and fused optimizer, written to be as fast as possible.
*pytorch_optimizer* is the SAM of that package. *torch fused* and *torch foreach* are torch.optim's
own.
"""


def write(files: Sequence[Path], folder: Path) -> None:
    """Write the page and its figures.

    Raises:
        ValueError: a file is not a result of `eigenfilter bench` that the page can show.
    """
    (folder / "figures").mkdir(exist_ok=True)
    lines = [INTRODUCTION, PEERS]
    for file in files:
        data = _read(file)
        if "memory" in data:
            lines += _memory(data, file, folder)
        elif "curvature" in data:
            lines += _curvature(data, file)
        elif "host" in data:
            lines += _launches(data, file)
        else:
            lines += _all_timings(data, file, folder)
    page = folder / "benchmarks.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {page}")


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    kinds = {"results", "memory", "curvature", "host"}
    if not isinstance(data, dict) or not kinds & data.keys():
        raise ValueError(
            f"{file} holds no timings, memory, curvature or costs of launches: name a JSON file "
            "that eigenfilter bench wrote"
        )
    current: dict[str, Any] = with_current_names(data)
    return current


@dataclass(frozen=True)
class Section:
    """A section of the page with a figure of timings.

    Attributes:
        name: the last part of the figure's file name.
        title: the heading.
        text: the paragraph above the figure.
        panels: makes the panels from the rows of a device and the type of the device.
        label: what the length of a bar means; see `figures.draw`.
        scale: the axis; see `figures.draw`.
    """

    name: str
    title: str
    text: str
    panels: Callable[[Rows, str], dict[str, Panel]]
    label: str
    scale: Scale


def _all_timings(data: Mapping[str, Any], file: Path, folder: Path) -> list[str]:
    """The sections of a file of timings."""
    lines = []
    for device, backend in dict.fromkeys((r["device"], r["backend"]) for r in data["results"]):
        rows = {
            r["name"]: r
            for r in data["results"]
            if (r["device"], r["backend"]) == (device, backend)
        }
        lines += _timings(rows, device, backend, _source(data, file), folder)
    return lines


def _timings(rows: Rows, device: str, backend: str, source: str, folder: Path) -> list[str]:
    """The sections of one device and backend."""
    timed_rows = {name: row for name, row in rows.items() if row["timing"] is not None}
    lines = [f"## Timings: {device}, {backend} kernels", "", source, ""]
    for section in SECTIONS:
        panels = {t: p for t, p in section.panels(timed_rows, device).items() if p}
        if not panels:
            continue
        path = Path("figures") / f"benchmarks-{device}-{backend}-{section.name}.png"
        figures.draw(panels, folder / path, label=section.label, scale=section.scale)
        lines += [f"### {section.title}", "", section.text, "", f"![{section.title}]({path})", ""]
    return [*lines, *_goals(rows)]


def _steps(rows: Rows, device: str) -> dict[str, Panel]:
    return {
        summary: {
            method: _ratios(rows[f"{method}-{model}"], lambda other: other != "copy")
            for method in METHODS
            if f"{method}-{model}" in rows
        }
        for model, (summary, _) in MODELS.items()
    }


def _training(rows: Rows, device: str) -> dict[str, Panel]:
    return {
        NETWORKS[network].summary: {
            method: _ratios(rows[f"train-{network}-{method}"], lambda other: True)
            for method in methods
            if f"train-{network}-{method}" in rows
        }
        for network, methods in METHODS_BY_NETWORK.items()
    }


def _bandwidth(rows: Rows, device: str) -> dict[str, Panel]:
    def of_copy(names: Mapping[str, str]) -> dict[str, Bar]:
        return {
            series: _ratios(rows[name], lambda other: other == "copy")["copy"]
            for series, name in names.items()
            if name in rows
        }

    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCES]
    panels: dict[str, dict[str, dict[str, Bar]]] = {
        summary: {method: of_copy({"float32": f"{method}-{model}"}) for method in METHODS}
        for model, (summary, _) in MODELS.items()
        if model != "small"
    }
    panels["kernels"] = {k: of_copy({dtype: f"{k}-{dtype}" for dtype in dtypes}) for k in KERNELS}
    return {
        title: {group: bars for group, bars in panel.items() if bars}
        for title, panel in panels.items()
    }


def _host(rows: Rows, device: str) -> dict[str, Panel]:
    key = "seconds" if device == "cpu" else "host"
    panel: dict[str, dict[str, Bar]] = {}
    for method in METHODS:
        if f"{method}-small" not in rows:
            continue
        timing = rows[f"{method}-small"]["timing"]
        times = {c["against"]: c[key] for c in timing["comparisons"] if c["against"] != "copy"}
        panel[method] = {
            name: _bar(spread, 1e3) for name, spread in {"ours": timing[key], **times}.items()
        }
    return {MODELS["small"][0]: panel}


SECTIONS = (
    Section(
        "steps",
        "Steps, gradients given",
        "Neither model nor backward pass is timed.",
        _steps,
        "the other's time over ours",
        "ratio",
    ),
    Section(
        "training",
        "Training",
        f"Forward, backward and step. *{GRADIENTS}* is no peer: it takes as many\n"
        "gradients, all at one point, and one update.",
        _training,
        "the other's time over ours",
        "ratio",
    ),
    Section(
        "bandwidth",
        "Bandwidth",
        "The bytes that the work has to move, over our time, relative to the bandwidth of a copy\n"
        "timed beside it. It can be above 1, because a copy also reads the memory that it\n"
        "overwrites, and because caches help.",
        _bandwidth,
        "our bandwidth over a copy's",
        "fraction",
    ),
    Section(
        "host",
        "What a step costs the host",
        "The time until the calls have returned, without waiting for the device. A CPU does the\n"
        "work within the calls, so there it is the whole time, nearly all of it overhead.",
        _host,
        "milliseconds",
        "amount",
    ),
)


def _memory(data: Mapping[str, Any], file: Path, folder: Path) -> list[str]:
    """The section of a table of memory."""
    title = f"Memory: {data['device']}"
    path = Path("figures") / f"benchmarks-{data['device']}-memory.png"
    panel = {name: {"peak": Bar(size)} for name, size in data["memory"].items()}
    summary = f"{data['elements']:,} parameters, float32 unless a name says bfloat16"
    figures.draw({summary: panel}, folder / path, label="peak bytes a parameter", scale="amount")
    return [
        f"## {title}",
        "",
        _source(data, file),
        "",
        "The peak of a training step in a process of its own: parameters, state, backup, gradient.",
        "",
        f"![{title}]({path})",
        "",
    ]


def _curvature(data: Mapping[str, Any], file: Path) -> list[str]:
    """The section of eigenpairs of Hessians."""
    title, legend = "## Curvature: cpu", curvature.LEGEND
    if curvature.all_large([row["name"] for row in data["curvature"]]):
        title, legend = "## Curvature of large networks: cpu", "Columns as above.\n"
    lines = [title, "", _source(data, file), "", legend]
    for row in data["curvature"]:
        lines += curvature.table(row)
    if data["tracking"]:
        lines += curvature.tracking_table(data["tracking"])
    return [*lines, *(f"- {line}" for line in data["absent"])]


def _launches(data: Mapping[str, Any], file: Path) -> list[str]:
    """The section of launches."""
    title = "## What a launch costs the host"
    rows = map(host.row, data["host"])
    busy = f"Other processes kept {data['busy_cores']} cores busy meanwhile."
    source = f"{_source(data, file)} {busy}"
    return [title, "", source, "", host.LEGEND, *host.HEADER, *rows, ""]


def _goals(rows: Rows) -> list[str]:
    """The goals that were missed or not judged, then failed verifications and absent peers."""
    verdicts: dict[str, list[str]] = {"met": [], "missed": [], "not judged": []}
    remarks = []
    for name, row in rows.items():
        remarks += [f"- `{name}`: {line}" for line in row.get("absent", ())]
        if row["timing"] is None:
            remarks.append(f"- `{name}`: FAILED, not timed")
            continue
        for c in row["timing"]["comparisons"]:
            if c["goal"] is None:
                continue
            verdict = "met" if c["ratio"]["median"] >= c["goal"] else "missed"
            if row["timing"]["busy_cores"] > MAX_BUSY_CORES:
                verdict = "not judged"
            low, median, high = (c["ratio"][q] for q in ("low", "median", "high"))
            verdicts[verdict].append(
                f"| {name} | {c['against']} | {median:.2f} [{low:.2f}, {high:.2f}] | "
                f"{c['goal']:.2f} |"
            )
    lines = [
        "### Goals",
        "",
        ", ".join(f"{len(goals)} {verdict}" for verdict, goals in verdicts.items()) + ".",
        "",
    ]
    for verdict in ("missed", "not judged"):
        if verdicts[verdict]:
            head = [f"| {verdict} | against | ratio | goal |", "| --- | --- | --- | --- |"]
            lines += [*head, *verdicts[verdict], ""]
    return [*lines, *remarks, ""] if remarks else lines


def _source(data: Mapping[str, Any], file: Path) -> str:
    e = data["environment"]
    where = f"{e.get('gpu', e['cpu'])}, {report.count(e['threads'], 'thread')}, {e['isa']}"
    origin = f"{data['date']}, revision {e['revision']}, {where}, torch {e['torch']}."
    note = "" if data.get("complete", True) else " The run was stopped before its end."
    return f"`{file.name}`: {origin}{note}"


def _ratios(row: Mapping[str, Any], is_included: Callable[[str], bool]) -> dict[str, Bar]:
    return {
        c["against"]: _bar(c["ratio"], goal=c["goal"])
        for c in row["timing"]["comparisons"]
        if is_included(c["against"])
    }


def _bar(spread: Mapping[str, float], scale: float = 1.0, goal: float | None = None) -> Bar:
    return Bar(scale * spread["median"], scale * spread["low"], scale * spread["high"], goal)
