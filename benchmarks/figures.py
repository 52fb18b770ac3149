"""Grouped bar charts, in one style for all measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#e69f00", "#56b4e9", "#555555", "#bbbb44")
PANELS_PER_ROW = 3
BAR = 0.16  # inches
TITLE = 0.9  # inches for a panel's title and axis
GAP = 0.6  # between groups, in bars


@dataclass(frozen=True)
class Bar:
    """A value, its quartiles if there are any, and the goal for it if there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    goal: float | None = None


Panel = Mapping[str, Mapping[str, Bar]]
"""Bars by group (a label on the axis), then by series (a color)."""

Scale = Literal["ratio", "fraction", "amount"]


def draw(panels: Mapping[str, Panel], path: Path, *, label: str, scale: Scale) -> None:
    """Write a PNG of horizontal bars.

    Args:
        panels: the panels by title. Together they have at most as many series as COLORS.
        path: path of the PNG.
        label: what the length of a bar means.
        scale: "ratio" is logarithmic, and bars begin at 1. "fraction" begins at 0 and has a line
            at 1. "amount" begins at 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, NullLocator

    series = list(
        dict.fromkeys(s for panel in panels.values() for bars in panel.values() for s in bars)
    )
    colors = {name: COLORS[i] for i, name in enumerate(series)}
    across = min(PANELS_PER_ROW, len(panels))
    down = -(-len(panels) // across)
    tallest = max(_height(panel) for panel in panels.values())
    figure = Figure(
        figsize=(max(3.6 * across, 6.5), down * (tallest * BAR + TITLE) + 0.5),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axes, panel, colors, 1.0 if scale == "ratio" else 0.0)
        axes.set_title(title, fontsize=10)
        if scale == "ratio":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else "")
            low, high = axes.get_xlim()
            if high < 2 * low:  # the axis may be without a tick at a power of ten
                axes.xaxis.set_major_locator(MaxNLocator(5))
                axes.xaxis.set_minor_locator(NullLocator())
        if scale != "amount":
            axes.axvline(1.0, color="0.3", linewidth=0.9, zorder=0)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(label, fontsize=9)
    if len(series) > 1:
        handles = [Patch(color=color, label=name) for name, color in colors.items()]
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(len(handles), 4),
            frameon=False,
            fontsize=9,
        )
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _height(panel: Panel) -> float:
    """A panel's height in bars."""
    return sum(len(bars) + GAP for bars in panel.values())


def _draw_panel(axes: Any, panel: Panel, colors: Mapping[str, str], start: float) -> None:
    at, ticks = 0.0, []
    for bars in panel.values():
        ticks.append(at + (len(bars) - 1) / 2)
        for name, bar in bars.items():
            whiskers = None
            if bar.low is not None and bar.high is not None:
                whiskers = [[bar.value - bar.low], [bar.high - bar.value]]
            axes.barh(
                at,
                bar.value - start,
                0.9,
                start,
                color=colors[name],
                xerr=whiskers,
                error_kw={"elinewidth": 0.9, "ecolor": "0.15"},
            )
            if bar.goal is not None:
                axes.vlines(bar.goal, at - 0.5, at + 0.5, color="black", linewidth=1.8)
            at += 1
        at += GAP
    axes.set_yticks(ticks, list(panel))
    axes.set_ylim(at - GAP, -1)
