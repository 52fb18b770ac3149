"""The outputs of a reproduction: results.json, summary.md, spectra.png and report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import eigenfilter as ef
from eigenfilter.experiments.files import replace_text
from eigenfilter.experiments.reporting import markdown_table
from eigenfilter.experiments.reproduce import html_report, spectra_figure, summary
from eigenfilter.experiments.reproduce.findings import Findings

FILES = ("results.json", "summary.md", "spectra.png", "report.html")

LIMITS = (
    "The paper's text was not available: learning rates, epochs, batch sizes, the width of the MLP "
    "and the number of seeds are ours; two-step and Hessian USAM follow our reading of its "
    "abstract.",
    "A filter describes the equilibria that an optimizer converges to. Runs with minibatches, a "
    "constant learning rate and few epochs do not settle at one. They may end well inside the "
    "edge or, if minibatches differ, beyond it. The ratio shows where each run ended.",
    "The filter of SAM depends on the norm of the gradient, so the tables give no edge for it.",
    "The sharpness is measured on the images named above, not on the whole training set. Its "
    "error, the residual ||H v - lambda v||, bounds the distance to an eigenvalue of their "
    "Hessian, except for the rounding of float32 in the products.",
    "Seconds are measured while runs execute side by side, on a machine that may have other work.",
)


def write(findings: Findings, out: Path) -> None:
    """Write all files.

    Raises:
        UserError: a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    results = {
        "command": "reproduce",
        "experiment": findings.plan.experiment,
        "statement": findings.plan.statement,
        "complete": findings.complete,
        "plan": findings.plan.as_dict(),
        "estimate": findings.plan.estimate,
        "seconds": findings.seconds,
        "settings": findings.settings(),
        "rows": [row.as_dict() for row in findings.rows],
        "verdicts": findings.verdicts,
        "checks": [
            asdict(check) | {"verdict": check.verdict, "sentence": check.sentence}
            for check in findings.checks
        ],
        "runs": [run.as_dict() for run in findings.runs],
        "limits": LIMITS,
        "versions": {"eigenfilter": ef.__version__, "torch": str(torch.__version__)},
    }
    text = json.dumps(results, indent=1, allow_nan=False)
    replace_text(out / "results.json", text + "\n")
    replace_text(out / "summary.md", markdown(findings))
    figure = spectra_figure.draw(findings.rows, findings.title)
    FigureCanvasAgg(figure)
    spectra_figure.save_png(figure, out / "spectra.png")
    replace_text(
        out / "report.html", html_report.page(findings, spectra_figure.as_svg(figure), LIMITS)
    )


def markdown(findings: Findings) -> str:
    """Return the tables and the conclusions as Markdown."""
    best = [row for row in findings.rows if row.best]
    parts = [
        f"# {findings.title}",
        "At the best rho of each method:",
        markdown_table(summary.table(best)),
        "The order of the sharpness:",
        _list(findings.verdicts),
        "Each comparison:",
        _list([check.sentence for check in findings.checks]),
        "Every rho:",
        markdown_table(summary.table(findings.rows)),
    ]
    for heading, lines in findings.failures.items():
        parts += [f"{heading}:", _list(lines)]
    return "\n\n".join(parts) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
