"""Draw the cost of flatness: the sharpness at the end of training over the number of gradients.

    eigenfilter sweep examples/flat_for_less.yaml --out out/flat
    python examples/flat_for_less.py out/flat

The script writes flat_for_less.png and flat_for_less.md into the folder. Gradients are counted in
whole batches, relative to SGD. The reduction is (SGD's sharpness - sharpness) / (SGD's sharpness -
full USAM's sharpness), from means over the seeds, with a standard error from the seeds of all
three.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLORS = {"late": "#0072b2", "every": "#d55e00", "constant": "#009e73", "sgd": "#555555"}


@dataclass(frozen=True)
class Point:
    """One configuration, with means over its seeds and their standard errors."""

    label: str
    kind: str
    gradients: float
    sharpness: float
    sharpness_error: float
    accuracy: float
    accuracy_error: float
    seeds: int


def point(row: dict[str, Any], steps: float) -> Point:
    """Return a row of the sweep's table as a point, with gradients relative to SGD."""
    options, measures = row["options"], row["measures"]
    kind = "sgd" if options["optimizer"] == "sgd" else options["rho_schedule"]
    label = {
        "sgd": "SGD",
        "constant": "USAM",
        "late": f"last {100 * (1 - options['rho_start']):.0f}%",
        "every": f"every {options['rho_every']}",
    }[kind]
    if options["ascent_part"] != 1:
        label += f", {options['ascent_part']:g} of the batch"

    def error(name: str) -> float:
        return float(measures[name]["deviation"]) / math.sqrt(measures[name]["n"])

    return Point(
        label,
        kind,
        measures["gradients"]["mean"] / steps,
        measures["sharpness"]["mean"],
        error("sharpness"),
        measures["test accuracy"]["mean"],
        error("test accuracy"),
        row["complete"],
    )


def reduction(p: Point, sgd: Point, usam: Point) -> tuple[float, float]:
    """Return the fraction of full USAM's reduction of the sharpness, and its standard error."""
    whole = sgd.sharpness - usam.sharpness
    part = (sgd.sharpness - p.sharpness) / whole
    terms = [(1 - part) * sgd.sharpness_error, part * usam.sharpness_error]
    if p not in (sgd, usam):
        terms.append(p.sharpness_error)
    return part, 0.0 if p in (sgd, usam) else math.hypot(*terms) / whole


def table(points: list[Point], sgd: Point, usam: Point) -> str:
    """Return a Markdown table with a row per configuration."""
    lines = [
        "| USAM in | gradients over SGD's | sharpness | reduction, % | test accuracy, % | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for p in points:
        part, error = reduction(p, sgd, usam)
        lines.append(
            f"| {p.label} | {p.gradients:.3f} | {p.sharpness:.2f} ± {p.sharpness_error:.2f} "
            f"| {100 * part:.0f} ± {100 * error:.0f} "
            f"| {100 * p.accuracy:.2f} ± {100 * p.accuracy_error:.2f} | {p.seeds} |"
        )
    return "\n".join(lines) + "\n"


def draw(points: list[Point], path: Path) -> None:
    """Draw sharpness and accuracy over gradients, hollow if ascents use a part of the batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for p in points:
        color = COLORS[p.kind]
        style = {"color": color, "marker": "o", "capsize": 2, "linestyle": "none"}
        style["markerfacecolor"] = "white" if "batch" in p.label else color
        left.errorbar(p.gradients, p.sharpness, p.sharpness_error, **style)
        right.errorbar(p.gradients, 100 * p.accuracy, 100 * p.accuracy_error, **style)
        left.annotate(
            p.label, (p.gradients, p.sharpness), xytext=(5, 4), textcoords="offset points", size=7
        )
    left.axvline(1.15, color="#bbbbbb", linestyle=":", zorder=0)
    left.set_ylabel("largest Hessian eigenvalue at the end")
    right.set_ylabel("test accuracy, %")
    for axes in (left, right):
        axes.set_xlabel("gradients, over SGD's")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read a sweep, and write its figure and its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder of the sweep")
    folder = parser.parse_args().folder
    rows = json.loads((folder / "results.json").read_text())["table"]
    complete = [row for row in rows if row["complete"] == row["runs"]]
    steps = next(
        row["measures"]["gradients"]["mean"]
        for row in complete
        if row["options"]["optimizer"] == "sgd"
    )
    points = sorted((point(row, steps) for row in complete), key=lambda p: p.gradients)
    [sgd] = [p for p in points if p.kind == "sgd"]
    [usam] = [p for p in points if p.label == "USAM"]
    text = table(points, sgd, usam)
    print(text, end="")
    (folder / "flat_for_less.md").write_text(text)
    draw(points, folder / "flat_for_less.png")


if __name__ == "__main__":
    main()
