"""The figures of the experiments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigenfilter.experiments.files import replace

if TYPE_CHECKING:
    from eigenfilter.experiments.full_batch import FullBatchRun


COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#e69f00", "#56b4e9", "#555555")
_DASHED = (0, (5, 3))


@dataclass(frozen=True)
class SharpnessCurve:
    """The sharpness over the steps of one run, and the edge of the filter at the same steps."""

    label: str
    steps: Sequence[int]
    sharpness: Sequence[float]
    edges: Sequence[float]


def curve_from_run(run: FullBatchRun) -> SharpnessCurve:
    """Return the curve of a run's measurements."""
    checks = run.history
    return SharpnessCurve(
        f"{run.method} ({run.settings})",
        [check.step for check in checks],
        [check.sharpness for check in checks],
        [check.edge for check in checks],
    )


@contextmanager
def canvas(path: Path, rows: int = 1, columns: int = 1) -> Iterator[Any]:
    """Yield axes to draw on, and write them as a PNG at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, sharex=True, sharey=True)
    replace(path, lambda file: figure.savefig(file, format="png", dpi=110))


def sharpness_figure(curves: Sequence[SharpnessCurve], path: Path, title: str) -> None:
    """Write a PNG of the sharpness over training: a solid line per run, and its edge dashed.

    Edges that several runs share are drawn in gray.
    """
    from matplotlib.lines import Line2D

    ends = [curve.edges[-1] for curve in curves]
    with canvas(path) as axes:
        for color, curve in zip(COLORS, curves, strict=False):
            shared = sum(abs(end / curve.edges[-1] - 1.0) < 1e-3 for end in ends) > 1
            edge_color = "0.4" if shared else color
            axes.step(
                curve.steps,
                curve.edges,
                where="post",
                color=edge_color,
                linestyle=_DASHED,
                linewidth=1.2,
                alpha=0.9,
            )
            axes.plot(curve.steps, curve.sharpness, color=color, linewidth=1.8, label=curve.label)
            axes.annotate(
                f"{curve.edges[-1]:.3g}",
                (1.0, curve.edges[-1]),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                color=edge_color,
                verticalalignment="center",
            )
        handles, _ = axes.get_legend_handles_labels()
        edge = Line2D([], [], color="0.4", linestyle=_DASHED, linewidth=1.2)
        edge.set_label("edge, from theory")
        axes.legend(handles=[*handles, edge], frameon=False, loc="best")
        axes.set(xlabel="training step", ylabel="sharpness: largest Hessian eigenvalue")
        axes.set(title=title)
        top = max(max(max(curve.edges), _ordinary(curve.sharpness)) for curve in curves)
        axes.set_ylim(0.0, 1.15 * top)
        axes.margins(x=0.0)
        _style_axes(axes)


def _ordinary(values: Sequence[float]) -> float:
    """Return the 99th percentile, so that a jump of the sharpness does not set the axis limits."""
    return sorted(values)[max(0, int(0.99 * len(values)) - 1)]


def _style_axes(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def paths_figure(
    paths: Mapping[str, Sequence[Sequence[float]]],
    levels: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Write a PNG of values over steps: a panel per method, a line per start, levels dashed."""
    with canvas(path, columns=len(paths)) as panels:
        for axes, (name, lines) in zip(panels, paths.items(), strict=True):
            for line in lines:
                axes.plot(line, color=COLORS[0], linewidth=1.2)
            for color, (level, values) in zip(COLORS[1:], levels.items(), strict=False):
                for value in values:
                    axes.axhline(value, color=color, linestyle=_DASHED, linewidth=1.2)
                axes.plot([], [], color=color, linestyle=_DASHED, label=level)
            axes.set_title(name.replace(", ", ",\n"), fontsize=10)
            axes.set(xlabel="step")
            _style_axes(axes)
        panels[0].set(ylabel="y")
        panels[0].legend(frameon=False, loc="center right")
