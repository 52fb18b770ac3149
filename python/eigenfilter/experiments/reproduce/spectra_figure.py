"""The figure: densities, largest eigenvalues and accuracies side by side, a row a momentum."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eigenfilter.curvature import SpectralDensity
from eigenfilter.experiments.figures import COLORS
from eigenfilter.experiments.files import replace
from eigenfilter.experiments.reproduce.plan import METHODS
from eigenfilter.experiments.reproduce.summary import RunGroup
from eigenfilter.experiments.runs import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 600  # of a density
_COLOR = dict(zip(METHODS, COLORS, strict=False))
_DASHED = (0, (5, 3))


def draw(rows: Sequence[RunGroup], title: str) -> Figure:
    """A row a momentum: the density, the largest eigenvalues beside the edge, the accuracy.

    Spectra are those of the best rho, the density a mean over seeds; the accuracies are of every
    rho, with a bar of one deviation.

    Args:
        rows: of `summary.group_runs`.
        title: stands above all.
    """
    from matplotlib.figure import Figure

    momenta = list(dict.fromkeys(row.momentum for row in rows))
    figure = Figure(figsize=(13.0, 4.0 * len(momenta) + 0.6), layout="constrained")
    panels = figure.subplots(len(momenta), 3, squeeze=False)
    for (densities, values, accuracies), momentum in zip(panels, momenta, strict=True):
        here = [row for row in rows if row.momentum == momentum]
        best = [row for row in here if row.best and any(run.spectrum for run in row.runs)]
        _densities(densities, best)
        _values(values, best)
        _accuracies(accuracies, here)
        densities.set_ylabel(f"momentum {momentum:g}\n\ndensity")
        for axes in (densities, values, accuracies):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    for axes, words in zip(
        panels[0], ("density of the Hessian", "largest eigenvalues", "test accuracy"), strict=True
    ):
        axes.set_title(words)
    figure.suptitle(title, wrap=True)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a PNG.

    Raises:
        UserError: it cannot be written.
    """
    replace(path, lambda file: figure.savefig(file, format="png", dpi=75))


def as_svg(figure: Figure) -> str:
    """The figure as an <svg> element, without what refers to elsewhere."""
    import matplotlib

    buffer = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "eigenfilter"}):
        figure.savefig(buffer, format="svg", metadata=about)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _densities(axes: Any, rows: Sequence[RunGroup]) -> None:
    found = {
        row.method: [_density(run.spectrum) for run in row.runs if run.spectrum] for row in rows
    }
    nodes = [density.measure()[0] for several in found.values() for density in several]
    axes.set_xlabel("eigenvalue")
    if not nodes:
        _nothing(axes)
        return
    low, high = min(float(at[0]) for at in nodes), max(float(at[-1]) for at in nodes)
    margin = 0.03 * max(high - low, 1e-12)
    grid = torch.linspace(low - margin, high + margin, POINTS, dtype=torch.float64)
    sigma = 0.01 * max(high - low, 1e-12)
    for row in rows:
        several = found[row.method]
        mean = torch.stack([density(grid, sigma) for density in several]).mean(0)
        axes.semilogy(
            grid.numpy(),
            mean.clamp_min(1e-12).numpy(),
            color=_COLOR[row.method],
            linewidth=1.4,
            label=row.label,
        )
    axes.set_ylim(bottom=0.01 / several[0].n)
    axes.legend(frameon=False, fontsize=8)


def _values(axes: Any, rows: Sequence[RunGroup]) -> None:
    """Eigenvalues of every seed by their rank, the mean as a line, the edge dashed."""
    axes.set(xlabel="rank", ylabel="eigenvalue")
    if not rows:
        _nothing(axes)
        return
    for row in rows:
        color = _COLOR[row.method]
        spectra = [run.spectrum["values"] for run in row.runs if run.spectrum]
        shown = min(len(values) for values in spectra)
        ranks = list(range(1, shown + 1))
        for values in spectra:
            axes.plot(ranks, values[:shown], ".", color=color, alpha=0.4, markersize=4)
        mean = torch.tensor([values[:shown] for values in spectra]).mean(0)
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
    """A point for every rho, the best one filled."""
    axes.set(ylabel="accuracy, rho beside it")
    methods = list(dict.fromkeys(row.method for row in rows))
    for place, method in enumerate(methods):
        several = [row for row in rows if row.method == method]
        for i, row in enumerate(several):
            mean = row.mean("accuracy")
            if mean is None:
                continue
            x = place + 0.7 * ((i + 0.5) / len(several) - 0.5)
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
    """The density of what `spectrum.as_json` gave."""
    kept = spectrum["density"]
    return SpectralDensity(
        torch.tensor(kept["nodes"], dtype=torch.float64),
        torch.tensor(kept["weights"], dtype=torch.float64),
        torch.tensor(kept["deflated"], dtype=torch.float64),
        spectrum["parameters"],
        kept["matvecs"],
    )


def _nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "no run was completed", transform=axes.transAxes, ha="center")
