"""The page of results: figures and words from the files that `eigenfilter bench` wrote.

Writes benchmarks.md and figures/*.png. The files may be of timings, of memory, of curvature and of
launches, from any devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import figures, host
from benchmarks.contest import TOLERANCES
from benchmarks.curvature import report as curvature
from benchmarks.figures import Bar, Panel, Scale
from benchmarks.kernels import KERNELS
from benchmarks.measure import MOST_NEIGHBOURS
from benchmarks.methods import METHODS
from benchmarks.networks import NETWORKS
from benchmarks.optimizers import MODELS
from benchmarks.training import PASSES, ROWS
from benchmarks.verify import REPETITIONS

Rows = Mapping[str, Mapping[str, Any]]
"""Results by name, as the JSON has them, of one device and backend."""

INTRODUCTION = f"""# Benchmarks

Written by `eigenfilter bench page` from the files named below; `eigenfilter bench` measures anew.

- Every row is verified before it is timed: after {REPETITIONS} repetitions from the same start,
  the library and its peers agree on parameters and state, to the tolerance in the files. What does
  not agree is not timed.
- They are then timed in turns, A B C, B C A, in one process. A ratio is the other's time over ours,
  round by round: above 1 we are faster. Bars are medians, whiskers quartiles, black marks goals.
- A goal is not judged where other processes kept more than {MOST_NEIGHBOURS} cores busy meanwhile.
"""

PEERS = """The peers: *common SAM* is the recipe that is widely copied into training code (clone,
add, put back, torch's optimizer); *foreach SAM* is the same with torch's multi-tensor functions and
fused optimizer, as well as it can be written; *pytorch_optimizer* is the package's SAM; *torch
fused* and *torch foreach* are torch.optim's own.
"""


def write(files: Sequence[Path], folder: Path) -> None:
    """Write the page and its figures.

    Raises:
        ValueError: a file is not what `eigenfilter bench` writes for one of these.
    """
    (folder / "figures").mkdir(exist_ok=True)
    lines = [INTRODUCTION, PEERS]
    for file in files:
        found = _read(file)
        if "memory" in found:
            lines += _memory(found, file, folder)
            continue
        if "curvature" in found:
            lines += _curvature(found, file)
            continue
        if "host" in found:
            lines += _launches(found, file)
            continue
        for device, backend in dict.fromkeys((r["device"], r["backend"]) for r in found["results"]):
            rows = {
                r["name"]: r
                for r in found["results"]
                if (r["device"], r["backend"]) == (device, backend)
            }
            lines += _timings(rows, device, backend, found, file, folder)
    page = folder / "benchmarks.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {page}")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    kinds = {"results", "memory", "curvature", "host"}
    if not isinstance(found, dict) or not kinds & found.keys():
        raise ValueError(f"{file} holds no timings, memory, curvature or costs of launches")
    return found


@dataclass(frozen=True)
class Section:
    """A figure of timings; `panels` are taken from the rows of one device, whose type it is told.

    The other attributes are those of `figures.draw`.
    """

    name: str
    title: str
    words: str
    panels: Callable[[Rows, str], dict[str, Panel]]
    label: str
    scale: Scale


def _timings(
    rows: Rows, device: str, backend: str, found: Mapping[str, Any], file: Path, folder: Path
) -> list[str]:
    """The sections of one device and backend."""
    timed = {name: row for name, row in rows.items() if row["timing"] is not None}
    lines = [f"## Timings: {device}, {backend} kernels", "", _source(found, file), ""]
    for section in SECTIONS:
        panels = {t: p for t, p in section.panels(timed, device).items() if p}
        if not panels:
            continue
        path = Path("figures") / f"benchmarks-{device}-{backend}-{section.name}.png"
        figures.draw(panels, folder / path, label=section.label, scale=section.scale)
        lines += [f"### {section.title}", "", section.words, "", f"![{section.title}]({path})", ""]
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
        for network, methods in ROWS.items()
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
    found: dict[str, dict[str, Bar]] = {}
    for method in METHODS:
        if f"{method}-small" not in rows:
            continue
        timing = rows[f"{method}-small"]["timing"]
        times = {c["against"]: c[key] for c in timing["comparisons"] if c["against"] != "copy"}
        found[method] = {
            name: _bar(spread, 1e3) for name, spread in {"ours": timing[key], **times}.items()
        }
    return {MODELS["small"][0]: found}


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
        f"Forward, backward and step. *{PASSES}* is no peer: it takes as many\n"
        "gradients, all at one point, and does one update.",
        _training,
        "the other's time over ours",
        "ratio",
    ),
    Section(
        "bandwidth",
        "Bandwidth",
        "The bytes that the work has to move, by our time, over the bandwidth of a copy beside\n"
        "it. Above 1: a copy reads what it is about to overwrite, or the caches help.",
        _bandwidth,
        "our bandwidth over a copy's",
        "fraction",
    ),
    Section(
        "host",
        "What a step costs the host",
        "Until the calls have returned, without waiting for the device. A CPU does the work\n"
        "within the calls: there it is the whole time, nearly all of it overhead.",
        _host,
        "milliseconds",
        "amount",
    ),
)


def _memory(found: Mapping[str, Any], file: Path, folder: Path) -> list[str]:
    """The section of a table of memory."""
    title = f"Memory: {found['device']}"
    path = Path("figures") / f"benchmarks-{found['device']}-memory.png"
    panel = {name: {"peak": Bar(size)} for name, size in found["memory"].items()}
    summary = f"{found['elements']:,} float32 parameters, no activations"
    figures.draw({summary: panel}, folder / path, label="peak bytes a parameter", scale="amount")
    return [
        f"## {title}",
        "",
        _source(found, file),
        "",
        "Peak of a training step, in a process of its own: parameters, state, backup, gradient.",
        "",
        f"![{title}]({path})",
        "",
    ]


def _curvature(found: Mapping[str, Any], file: Path) -> list[str]:
    """The section of eigenpairs of Hessians."""
    title, legend = "## Curvature: cpu", curvature.LEGEND
    if curvature.large([row["name"] for row in found["curvature"]]):
        title, legend = "## Curvature of large networks: cpu", "Columns as above.\n"
    lines = [title, "", _source(found, file), "", legend]
    for row in found["curvature"]:
        lines += curvature.table(row)
    if found["tracking"]:
        lines += curvature.tracks(found["tracking"])
    return [*lines, *(f"- {line}" for line in found["absent"])]


def _launches(found: Mapping[str, Any], file: Path) -> list[str]:
    """The section of launches."""
    title = "## What a launch costs the host"
    rows = map(host.row, found["host"])
    busy = f"Meanwhile others kept {found['neighbours']} cores busy."
    source = f"{_source(found, file)} {busy}"
    return [title, "", source, "", host.LEGEND, *host.HEADER, *rows, ""]


def _goals(rows: Rows) -> list[str]:
    """What was missed and what was not judged; what was red; who was absent."""
    verdicts: dict[str, list[str]] = {"met": [], "missed": [], "not judged": []}
    remarks = []
    for name, row in rows.items():
        remarks += [f"- `{name}`: {line}" for line in row.get("absent", ())]
        if row["timing"] is None:
            remarks.append(f"- `{name}`: RED, not timed")
            continue
        for c in row["timing"]["comparisons"]:
            if c["goal"] is None:
                continue
            verdict = "met" if c["ratio"]["median"] >= c["goal"] else "missed"
            if row["timing"]["neighbours"] > MOST_NEIGHBOURS:
                verdict = "not judged"
            low, median, high = (c["ratio"][q] for q in ("low", "median", "high"))
            verdicts[verdict].append(
                f"| {name} | {c['against']} | {median:.2f} [{low:.2f}, {high:.2f}] | "
                f"{c['goal']:.2f} |"
            )
    lines = [
        "### Goals",
        "",
        ", ".join(f"{len(found)} {verdict}" for verdict, found in verdicts.items()) + ".",
        "",
    ]
    for verdict in ("missed", "not judged"):
        if verdicts[verdict]:
            head = [f"| {verdict} | against | ratio | goal |", "| --- | --- | --- | --- |"]
            lines += [*head, *verdicts[verdict], ""]
    return [*lines, *remarks, ""] if remarks else lines


def _source(found: Mapping[str, Any], file: Path) -> str:
    e = found["environment"]
    where = f"{e.get('gpu', e['cpu'])}, {e['threads']} threads, {e['isa']}"
    known = f"{found['date']}, revision {e['revision']}, {where}, torch {e['torch']}."
    stopped = "" if found.get("complete", True) else " The run was stopped before its end."
    return f"`{file.name}`: {known}{stopped}"


def _ratios(row: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Bar]:
    return {
        c["against"]: _bar(c["ratio"], goal=c["goal"])
        for c in row["timing"]["comparisons"]
        if wanted(c["against"])
    }


def _bar(spread: Mapping[str, float], scale: float = 1.0, goal: float | None = None) -> Bar:
    return Bar(scale * spread["median"], scale * spread["low"], scale * spread["high"], goal)
