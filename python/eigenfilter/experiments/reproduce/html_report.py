"""report.html: a page in a single file, which works without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from eigenfilter.experiments.reproduce import summary
from eigenfilter.experiments.reproduce.findings import Findings

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(findings: Findings, svg: str, limits: Sequence[str]) -> str:
    """Return the page as HTML.

    A content security policy in its head forbids the browser to fetch anything.

    Args:
        findings: the findings.
        svg: the figure as an <svg> element.
        limits: limits of the results.
    """
    assets = files("eigenfilter.experiments.reproduce")
    style = assets.joinpath("report.css").read_text()
    script = assets.joinpath("report.js").read_text()
    title = escape(findings.title)
    best = [row for row in findings.rows if row.best]
    sections = [
        _section("Figure", _figure(svg)),
        _section("At the best rho of each method", _table(summary.table(best))),
        _section(
            "The order of the sharpness",
            "<p>The paper's claim: SGD ends sharper than USAM, and USAM sharper than two-step and "
            "Hessian USAM.</p>"
            + _list(findings.verdicts)
            + "<h3>Each comparison</h3>"
            + _list([check.sentence for check in findings.checks]),
        ),
        _section("Every rho", _table(summary.table(findings.rows))),
        *(_section(heading, _list(lines)) for heading, lines in findings.failures.items()),
        _section("Settings", _settings(findings.settings())),
        _section("Limits", _list(limits)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{''.join(sections)}<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _figure(svg: str) -> str:
    return (
        '<figure class="zoom" tabindex="0">\n'
        '<div class="buttons"><button type="button" data-zoom="0.8">+</button>'
        '<button type="button" data-zoom="1.25">&minus;</button>'
        '<button type="button" data-zoom="0">whole</button></div>\n'
        f"{svg}\n<figcaption>Zoom with Ctrl and the wheel or with + and -, drag to pan, and "
        "double-click to see the whole figure. Spectra are shown at the best rho: dots are seeds, "
        "lines are means, and dashed lines are the edges of the filters. A filled point marks the "
        "best rho.</figcaption>\n</figure>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest
    ]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def _settings(settings: dict[str, str]) -> str:
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in settings.items())
    return "<dl>\n" + "\n".join(pairs) + "\n</dl>"
