"""The figure of a reproduction: densities, eigenvalues and accuracies, with a row per momentum."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eigenfilter.curvature import SpectralDensity
from eigenfilter.experiments.files import replace
from eigenfilter.experiments.plots import COLORS
from eigenfilter.experiments.reproduce.plan import METHODS
from eigenfilter.experiments.reproduce.summary import RunGroup
from eigenfilter.experiments.runs import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 600  # at which a density is drawn
_COLOR = dict(zip(METHODS, COLORS, strict=False))
_DASHED = (0, (5, 3))


def draw(rows: Sequence[RunGroup], title: str) -> Figure:
    """Draw a row per momentum: the density, the largest eigenvalues with the edge, the accuracy.

    Spectra are shown for the best rho of each method, with the density averaged over seeds. The
    accuracies are shown for every rho, with bars of one standard deviation.

    Args:
        rows: the groups of runs that `summary.group_runs` returned.
        title: title of the figure.
    """
    from matplotlib.figure import Figure

    momenta = list(dict.fromkeys(row.momentum for row in rows))
    figure = Figure(figsize=(13.0, 4.0 * len(momenta) + 0.6), layout="constrained")
    panels = figure.subplots(len(momenta), 3, squeeze=False)
    for (densities, values, accuracies), momentum in zip(panels, momenta, strict=True):
        group = [row for row in rows if row.momentum == momentum]
        best = [row for row in group if row.best and any(run.spectrum for run in row.runs)]
        _densities(densities, best)
        _values(values, best)
        _accuracies(accuracies, group)
        densities.set_ylabel(f"momentum {momentum:g}\n\ndensity")
        for axes in (densities, values, accuracies):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    for axes, text in zip(
        panels[0], ("density of the Hessian", "largest eigenvalues", "test accuracy"), strict=True
    ):
        axes.set_title(text)
    figure.suptitle(title, wrap=True)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    replace(path, lambda file: figure.savefig(file, format="png", dpi=75))


def as_svg(figure: Figure) -> str:
    """Return the figure as an <svg> element without external references."""
    import matplotlib

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "eigenfilter"}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _densities(axes: Any, rows: Sequence[RunGroup]) -> None:
    by_method = {
        row.method: [_density(run.spectrum) for run in row.runs if run.spectrum] for row in rows
    }
    nodes = [density.measure()[0] for densities in by_method.values() for density in densities]
    axes.set_xlabel("eigenvalue")
    if not nodes:
        _nothing(axes)
        return
    low, high = min(float(at[0]) for at in nodes), max(float(at[-1]) for at in nodes)
    margin = 0.03 * max(high - low, 1e-12)
    grid = torch.linspace(low - margin, high + margin, POINTS, dtype=torch.float64)
    sigma = 0.01 * max(high - low, 1e-12)
    for row in rows:
        densities = by_method[row.method]
        mean = torch.stack([density(grid, sigma) for density in densities]).mean(0)
        axes.semilogy(
            grid.numpy(),
            mean.clamp_min(1e-12).numpy(),
            color=_COLOR[row.method],
            linewidth=1.4,
            label=row.label,
        )
    axes.set_ylim(bottom=0.01 / densities[0].n)
    axes.legend(frameon=False, fontsize=8)


def _values(axes: Any, rows: Sequence[RunGroup]) -> None:
    """Draw eigenvalues of every seed by rank, their mean as a line, and the edge dashed."""
    axes.set(xlabel="rank", ylabel="eigenvalue")
    if not rows:
        _nothing(axes)
        return
    for row in rows:
        color = _COLOR[row.method]
        spectra = [run.spectrum["values"] for run in row.runs if run.spectrum]
        count = min(len(values) for values in spectra)
        ranks = list(range(1, count + 1))
        for values in spectra:
            axes.plot(ranks, values[:count], ".", color=color, alpha=0.4, markersize=4)
        mean = torch.tensor([values[:count] for values in spectra]).mean(0)
        axes.plot(ranks, mean.tolist(), color=color, linewidth=1.4)
        edge = row.mean("edge")
        if edge is not None:
            axes.axhline(edge.value, color=color, linestyle=_DASHED, linewidth=1.2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.plot([], [], color="0.4", linestyle=_DASHED, label="edge of the filter")
    axes.legend(frameon=False, fontsize=8)


def _accuracies(axes: Any, rows: Sequence[RunGroup]) -> None:
    """Draw a point for every rho, filled for the best one."""
    axes.set(ylabel="accuracy, labeled with rho")
    methods = list(dict.fromkeys(row.method for row in rows))
    for place, method in enumerate(methods):
        group = [row for row in rows if row.method == method]
        for i, row in enumerate(group):
            mean = row.mean("accuracy")
            if mean is None:
                continue
            x = place + 0.7 * ((i + 0.5) / len(group) - 0.5)
            axes.errorbar(
                x,
                mean.value,
                yerr=mean.deviation,
                fmt="o",
                color=_COLOR[method],
                markerfacecolor=_COLOR[method] if row.best else "white",
                capsize=3,
            )
            if row.rho is not None:
                axes.annotate(
                    f"{row.rho:g}",
                    (x, mean.value + (mean.deviation or 0.0)),
                    xytext=(0, 6),
                    textcoords="offset points",
                    fontsize=7,
                    rotation=90,
                    horizontalalignment="center",
                )
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.set_xticks(range(len(methods)), [METHODS[m].replace(" ", "\n") for m in methods])


def _density(spectrum: Record) -> SpectralDensity:
    """Return the density in the data that `spectrum.as_json` returned."""
    density = spectrum["density"]
    return SpectralDensity(
        torch.tensor(density["nodes"], dtype=torch.float64),
        torch.tensor(density["weights"], dtype=torch.float64),
        torch.tensor(density["deflated"], dtype=torch.float64),
        spectrum["parameters"],
        density["matvecs"],
    )


def _nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "no complete run", transform=axes.transAxes, ha="center")
