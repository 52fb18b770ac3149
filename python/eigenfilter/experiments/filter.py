"""Print which Hessian eigenvalues each method admits at given hyperparameters.

Each line has a method, its gradients per step, the upper edge of the admitted eigenvalues, and the
admitted intervals. They hold for full batches. With weight decay they are exact for SGD, and hold
to first order in the weight decay for the other methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eigenfilter import filters
from eigenfilter.experiments.errors import UserError, require
from eigenfilter.experiments.files import output_folder, replace
from eigenfilter.filters import AscentFilter, Filter, PolynomialFilter

FORMATS = (".png", ".svg", ".pdf")
HELP = "which eigenvalues do the methods admit?"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    number = {"type": float, "metavar": "X"}
    parser.add_argument("--lr", required=True, help="learning rate", **number)  # type: ignore[arg-type]
    for name, default, text in (
        ("momentum", 0.0, "momentum, in [0, 1)"),
        ("dampening", 0.0, "dampening of the momentum"),
        ("weight-decay", 0.0, "weight decay, at least 0"),
        ("rho", 0.05, "radius of the ascents, and of MSAM"),
        ("hessian-rho", None, "radius of Hessian USAM (default: rho)"),
        ("extrapolation", None, "extrapolation of heavy ball and AdamW, which are then shown too"),
        ("momentum-norm", None, "norm of the momentum at which to show the edge of MSAM"),
        ("grad-norm", None, "gradient norm at which to show the edge of SAM, which depends on it"),
        ("beta1", None, "beta1 of AdamW, which is then shown for the preconditioned Hessian"),
    ):
        help_text = f"{text} (default: %(default)s)" if default is not None else text
        parser.add_argument(f"--{name}", default=default, help=help_text, **number)  # type: ignore[arg-type]
    parser.add_argument(
        "--nesterov", action="store_true", help="Nesterov momentum instead of heavy ball"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the filter polynomials and the admitted sets into a PNG, SVG or PDF file",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, and draw it on request; return the exit code."""
    if args.plot is not None:
        require("matplotlib")
    try:
        rows = table(args)
    except (ValueError, OverflowError) as error:
        raise UserError(str(error)) from error
    if args.plot is not None and args.plot.suffix not in FORMATS:
        raise UserError(f"--plot must end in one of {', '.join(FORMATS)}, not {args.plot.name!r}")
    if args.json:
        print(json.dumps([_record(*row) for row in rows], indent=1))
    else:
        print("\n".join(lines(rows)))
    if args.plot is not None:
        output_folder(args.plot.parent)
        curves = {name: f for name, f, _ in rows if isinstance(f, PolynomialFilter)}
        plot(curves, args.plot)
        if not args.json:
            print(f"\nwrote {args.plot}")
    return 0


FilterRow = tuple[str, Filter, int]


def table(args: argparse.Namespace) -> list[FilterRow]:
    """Return the name, the filter and the gradients per step of each method."""
    common = (args.lr, args.momentum, args.dampening, args.weight_decay)
    base = "Nesterov" if args.nesterov else "heavy ball" if args.momentum else "gradient descent"
    rows: list[FilterRow] = [
        (base, (filters.Nesterov if args.nesterov else filters.HeavyBall)(*common), 1)
    ]
    ahead = args.extrapolation
    if ahead is not None:
        ball = filters.HeavyBall(*common, extrapolation=ahead)
        rows.append((f"heavy ball, extrapolation {ahead:g}", ball, 1))
    if args.momentum_norm is not None:
        msam = filters.MSAM(*common, rho=args.rho, momentum_norm=args.momentum_norm)
        rows.append((f"MSAM at momentum norm {args.momentum_norm:g}", msam, 1))
    for theory in filters.ASCENTS.values():
        for name, options in _forms(theory, args.grad_norm):
            flt = theory(*common, rho=args.rho, nesterov=args.nesterov, **options)
            if flt.terms.power > 1 and args.hessian_rho is not None:
                flt = dataclasses.replace(flt, rho=args.hessian_rho)
            rows.append((name, flt, theory.gradients))
    if args.beta1 is not None:
        adamw = filters.AdamW(args.lr, args.beta1, args.weight_decay)
        rows.append(("AdamW", adamw, 1))
        if ahead is not None:
            adamw = dataclasses.replace(adamw, extrapolation=ahead)
            rows.append((f"AdamW, extrapolation {ahead:g}", adamw, 1))
    return rows


def _forms(theory: type[AscentFilter], grad_norm: float | None) -> list[tuple[str, dict[str, Any]]]:
    """Return the forms of a method that are shown: their names, and the filter's options."""
    if theory.takes("grad_norm"):
        if grad_norm is None:
            return []
        return [(f"{theory.title} at gradient norm {grad_norm:g}", {"grad_norm": grad_norm})]
    forms: list[tuple[str, dict[str, Any]]] = [
        (f"{theory.title}, {form}", {"ascent": form}) for form in theory.forms
    ]
    return forms or [(theory.title, {})]


def lines(rows: Sequence[FilterRow]) -> list[str]:
    """Return the lines of the table."""
    cells = [("method", "gradients", "edge", "admitted eigenvalues")]
    for name, flt, gradients in rows:
        intervals = " and ".join(f"[{low:.6g}, {high:.6g}]" for low, high in flt.intervals())
        cells.append((name, str(gradients), f"{flt.max_eigenvalue():.6g}", intervals or "none"))
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return [
        f"{name:<{widths[0]}}  {count:>{widths[1]}}  {edge:>{widths[2]}}  {admitted}".rstrip()
        for name, count, edge, admitted in cells
    ]


def plot(curves: Mapping[str, PolynomialFilter], path: Path) -> None:
    """Draw the polynomial p(lambda) of each method.

    The curve is thick over the admitted set, which is also drawn in a panel below.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from eigenfilter.experiments.plots import COLORS

    ends = [end for f in curves.values() for end in _finite_ends(f)]
    low, high = min(ends, default=-1.0), max(ends, default=1.0)
    margin = 0.08 * (high - low or 1.0)
    grid = np.linspace(low - margin, high + margin, 2001)
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    for i, (color, (name, flt)) in enumerate(zip(COLORS, curves.items(), strict=False)):
        p = flt.p(grid)
        above.plot(grid, p, color=color, linewidth=0.8, alpha=0.6)
        above.plot(
            grid, np.where(flt.admits(grid), p, np.nan), color=color, linewidth=2.2, label=name
        )
        for left, right in flt.intervals():
            ends_of_it = [max(left, grid[0]), min(right, grid[-1])]
            if left == right:
                below.plot([left], [-i], "o", color=color, markersize=4)
            below.plot(ends_of_it, [-i, -i], color=color, linewidth=4, solid_capstyle="butt")
    levels = [abs(float(f.p(end))) for f in curves.values() for end in _finite_ends(f)]
    edge = max(levels, default=0.0) or 1.0
    above.set(ylabel="p(λ)", ylim=(-0.6 * edge, 1.6 * edge))
    above.legend(frameon=False, loc="lower right")
    below.set(xlabel="Hessian eigenvalue λ", yticks=[], ylabel="admitted")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    kind = path.suffix.removeprefix(".")
    replace(path, lambda file: figure.savefig(file, format=kind, dpi=160))


def _finite_ends(flt: Filter) -> list[float]:
    return [end for pair in flt.intervals() for end in pair if math.isfinite(end)]


def _record(name: str, flt: Filter, gradients: int) -> dict[str, object]:
    return {
        "method": name,
        "gradients": gradients,
        "max_eigenvalue": _finite(flt.max_eigenvalue()),
        "intervals": [[_finite(low), _finite(high)] for low, high in flt.intervals()],
    }


def _finite(value: float) -> float | None:
    """Return None instead of infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
