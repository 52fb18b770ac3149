"""What mkdocs does beside its plugins, without a network.

Pages get the parts that the code writes: see `generated`. Formulas become MathML, which browsers
draw themselves. Public names in code lead to the API reference. Links to files of the repository
outside docs lead to copies of them on the site. And nothing on a page may be loaded from elsewhere.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from generated import fill

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
ENTRY = re.compile(r"^::: (eigenfilter\.\S+)$", re.MULTILINE)
NAME = re.compile(r"<a\b.*?</a>|<h\d.*?</h\d>|<code>((?:[A-Za-z_]\w*\.)*\w+)</code>", re.DOTALL)
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)\)")
LOADED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\ssrc="(?:https?:)?//[^"]*"|<link\b[^>]*>'
)
SOURCES = "repository"

entries: dict[str, str] = {}
"""Each name of the API reference with its page."""


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Draw the formulas that pymdownx.arithmatex has marked, and link public names."""

    def draw(found: re.Match[str]) -> str:
        tag, bracket, formula = found.groups()
        try:
            drawn = convert(html.unescape(formula), display="inline" if bracket == "(" else "block")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: cannot draw {formula!r}: {error}") from error
        if unknown := re.findall(r"\\\w+", drawn):
            raise PluginError(f"{page.file.src_uri}: no symbol is known for {', '.join(unknown)}")
        return f'<{tag} class="formula">{drawn}</{tag}>'

    def link(found: re.Match[str]) -> str:
        entry = _entry(found[1], page.file.src_uri) if found[1] else None
        if entry is None:
            return found[0]
        target = posixpath.relpath(entries[entry], posixpath.dirname(page.file.src_uri) or ".")
        return f'<a href="{target.removesuffix(".md")}.html#{entry}">{found[0]}</a>'

    return NAME.sub(link, FORMULA.sub(draw, content))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Note the names of the API reference; add a page for every file outside docs with a link."""
    entries.clear()
    for page in list(files.documentation_pages()):
        entries.update(dict.fromkeys(ENTRY.findall(fill(page.content_string)), page.src_uri))
        for link in LINK.findall(page.content_string):
            for path in _outside(link, page.src_uri, config):
                if files.get_file_from_path(_copy(path)) is None:
                    files.append(_page(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Add what the code writes, and let links out of docs lead to copies, which no search finds.

    A page that stands alone in the navigation has no list of pages beside it.
    """
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])
    if page.file.src_uri.startswith(SOURCES):
        page.meta.setdefault("search", {"exclude": True})

    def lead(found: re.Match[str]) -> str:
        for path in _outside(found[1], page.file.src_uri, config):
            here = posixpath.dirname(page.file.src_uri) or "."
            return f"]({posixpath.relpath(_copy(path), here)})"
        return found[0]

    return LINK.sub(lead, fill(markdown))


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Refuse a page that loads something from elsewhere."""
    for tag in LOADED.findall(output):
        if "//" in tag and 'rel="canonical"' not in tag:
            raise PluginError(f"{page.file.src_uri} would load something from elsewhere: {tag}")
    return output


def on_post_build(config: MkDocsConfig, **_: object) -> None:
    """Refuse links of names to entries that the API reference does not show."""
    for entry, page in entries.items():
        built = Path(config.site_dir, page).with_suffix(".html").read_text()
        if f'id="{entry}"' not in built:
            raise PluginError(f"{page} has no heading for {entry}")


def _entry(name: str, page: str) -> str | None:
    """The name of the API reference that `name` in code on `page` stands for, if any.

    "ef.USAM", "filters.USAM" and "USAM" do, but no plain word as "norm". Where several would do it
    is the one on the page itself, or the optimizer.
    """
    end = "." + re.sub(r"^(ef|eigenfilter)\.", "", name)
    if name.islower() and "." not in name and "_" not in name:
        return None
    fitting = [entry for entry in entries if entry.endswith(end)]
    best = [entry for entry in fitting if entries[entry] == page]
    best += [entry for entry in fitting if ".optimizers." in entry]
    return (best or fitting or [None])[0]


def _outside(link: str, page: str, config: MkDocsConfig) -> Iterator[str]:
    """What `link` on `page` names outside docs, if anything, as a path from the root."""
    docs = Path(config.docs_dir)
    target = Path(os.path.normpath(docs / posixpath.dirname(page) / link))
    if not target.is_relative_to(docs) and target.is_file():
        yield target.relative_to(docs.parent).as_posix()


def _copy(path: str) -> str:
    return f"{SOURCES}/{path}" if path.endswith(".md") else f"{SOURCES}/{path}.md"


def _page(path: str, config: MkDocsConfig) -> File:
    text = (Path(config.docs_dir).parent / path).read_text()
    if not path.endswith(".md"):
        text = f"# {path}\n\n```{Path(path).suffix[1:]}\n{text}```\n"
    return File.generated(config, _copy(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
