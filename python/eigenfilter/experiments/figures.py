"""The figures of the experiments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """Sharpness over the steps of one run, and the edge it is expected to end at."""

    label: str
    steps: Sequence[int]
    sharpness: Sequence[float]
    edge: float


def sharpness_figure(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Write a PNG of sharpness over training: one solid line a method, its edge dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for color, curve in zip(COLORS, curves, strict=False):
        axes.axhline(curve.edge, color=color, linestyle=(0, (5, 3)), linewidth=1.2, alpha=0.9)
        axes.plot(curve.steps, curve.sharpness, color=color, linewidth=1.8, label=curve.label)
        axes.annotate(
            f"{curve.edge:.1f}",
            (1.0, curve.edge),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=color,
            verticalalignment="center",
        )
    handles, _ = axes.get_legend_handles_labels()
    edge = Line2D([], [], color="0.4", linestyle=(0, (5, 3)), linewidth=1.2)
    edge.set_label("edge, from theory")
    axes.legend(handles=[*handles, edge], frameon=False, loc="lower right")
    axes.set(xlabel="training step", ylabel="sharpness: largest Hessian eigenvalue", title=title)
    axes.set_ylim(bottom=0.0)
    axes.margins(x=0.0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#e69f00", "#56b4e9", "#555555")
