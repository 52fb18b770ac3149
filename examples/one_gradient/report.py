"""The figure and the tables of the study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from methods import METHODS
from problems import PROBLEMS
from torch.nn import Parameter

import eigenfilter as ef

COLORS = {
    "sgd": "#555555",
    "effective": "#999999",
    "ahead0": "#9ecae1",
    "ahead1": "#4292c6",
    "ahead2": "#08519c",
    "msam": "#009e73",
    "usam": "#d55e00",
    "every": "#fdae6b",
    "sam": "#cc79a7",
}
"""The methods of the figure."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean, NaN of no value; one alone has no error."""
        if not values:
            return cls(math.nan, math.nan)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """Return "mean ± error"."""
        return f"{scale * self.value:.{digits}f} ± {scale * self.error:.{digits}f}"


def reduction(mine: Mean, sgd: Mean, usam: Mean) -> Mean:
    """The share of USAM's reduction of the sharpness below SGD's, errors propagated linearly."""
    whole = sgd.value - usam.value
    if whole == 0:
        return Mean(math.nan, math.nan)
    part = (sgd.value - mine.value) / whole
    terms = ((1 - part) * sgd.error, part * usam.error, mine.error)
    return Mean(part, math.hypot(*terms) / abs(whole))


def edge(problem: str, method: str, lr: float) -> float:
    """The edge of a method's filter on full batches at the largest lr; NaN if it needs a norm."""
    if method in ("sam", "msam"):  # their edges move with the gradient's and the momentum's
        return math.nan
    opt = METHODS[method].build([Parameter(torch.zeros(1))], lr, PROBLEMS[problem])
    return ef.filters.of(opt)[0].max_eigenvalue()


def table(name: str, records: Sequence[Record]) -> str:
    """Return the table of a problem, with a row for each method."""
    runs = {m: [r for r in records if r["method"] == m] for m in METHODS}
    complete = {m: [r for r in some if "diverged" not in r] for m, some in runs.items()}

    def mean(method: str, get: Callable[[Record], float]) -> Mean:
        return Mean.of([get(r) for r in complete[method]])

    has_statistics = any("re-estimated accuracy" in r for r in records)
    head = ["method", "lr", "edge", "gradients", "seconds", "sharpness", "reduction, %"]
    head += ["test accuracy, %", "training loss", "averaged: sharpness", "its test accuracy, %"]
    head += ["re-estimated, %"] if has_statistics else []
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    sgd, usam = (mean(m, lambda r: r["sharpness"]) for m in ("sgd", "usam"))
    seconds = mean("sgd", lambda r: r["seconds"]).value
    for method, some in runs.items():
        lr = some[0]["lr"]
        limit = edge(name, method, lr)
        cells = [METHODS[method].title, f"{lr:g}", "" if math.isnan(limit) else f"{limit:.1f}"]
        if not complete[method]:
            cells += ["every run diverged"] + [""] * (len(head) - 4)
            lines.append("| " + " | ".join(cells) + " |")
            continue
        sharpness = mean(method, lambda r: r["sharpness"])
        lost = len(some) - len(complete[method])
        cells[0] += f" ({lost} of {len(some)} diverged)" if lost else ""
        share = "0" if method == "sgd" else "100"
        if method not in ("sgd", "usam"):
            share = reduction(sharpness, sgd, usam).text(0, 100)
        cells += [
            f"{mean(method, lambda r: r['gradients']).value:.2f}",
            f"{mean(method, lambda r: r['seconds']).value / seconds:.2f}",
            sharpness.text(),
            share,
            mean(method, lambda r: r["test accuracy"]).text(2, 100),
            mean(method, lambda r: r["training loss"]).text(3),
            mean(method, lambda r: r["average"]["sharpness"]).text(),
            mean(method, lambda r: r["average"]["test accuracy"]).text(2, 100),
        ]
        if has_statistics:
            cells.append(mean(method, lambda r: r["re-estimated accuracy"]).text(2, 100))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(problems: dict[str, list[Record]], path: Path) -> None:
    """Draw the sharpness over seconds, and the accuracy over the sharpness at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure = Figure(figsize=(3.6 * len(problems) + 2.6, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(2, len(problems), squeeze=False).T
    for (upper, lower), (name, records) in zip(columns, problems.items(), strict=True):
        for method, color in COLORS.items():
            runs = [r for r in records if r["method"] == method and "diverged" not in r]
            if runs:
                _draw_path(upper, [r["path"] for r in runs], color, METHODS[method].title)
                sharpness = Mean.of([r["sharpness"] for r in runs])
                accuracy = Mean.of([100 * r["test accuracy"] for r in runs])
                errors = {"xerr": sharpness.error, "yerr": accuracy.error}
                lower.errorbar(sharpness.value, accuracy.value, **errors, color=color, marker="o")
        upper.set_title(PROBLEMS[name].title, size=10)
        upper.set_xlim(left=0)
        upper.set_xlabel("seconds of training, one core")
        lower.set_xlabel("largest Hessian eigenvalue at the end")
        upper.set_yscale("log")
        lower.set_xscale("log")
        for axis in (upper.yaxis, lower.xaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    columns[0][0].set_ylabel("largest Hessian eigenvalue")
    columns[0][1].set_ylabel("test accuracy, %")
    figure.legend(*columns[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_path(axes: Any, paths: list[list[list[float]]], color: str, label: str) -> None:
    """Draw the mean of paths of (step, seconds, sharpness), in a band of its standard error."""
    points = list(zip(*paths, strict=True))
    seconds = [statistics.fmean(p[1] for p in at) for at in points]
    means = [Mean.of([p[2] for p in at]) for at in points]
    axes.plot(seconds, [m.value for m in means], color=color, marker="o", ms=3, label=label)
    band = [(m.value - m.error, m.value + m.error) for m in means]
    axes.fill_between(seconds, *zip(*band, strict=True), color=color, alpha=0.15, lw=0)


def write(records: Sequence[Record], folder: Path) -> None:
    """Write figure and tables of the problems that are complete so far."""
    problems = {
        name: [r for r in records if r["problem"] == name and r["final"]] for name in PROBLEMS
    }
    problems = {name: some for name, some in problems.items() if some}
    texts = [f"## {PROBLEMS[n].title}\n\n{table(n, some)}" for n, some in problems.items()]
    (folder / "one_gradient.md").write_text("\n".join(texts))
    draw(problems, folder / "one_gradient.png")
