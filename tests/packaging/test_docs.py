"""The README and the docs: examples run, links and names lead somewhere, nothing is missing."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import ismodule
from pathlib import Path

import pytest

from pages import ROOT, blocks_of, run_page, sharpness_and_edge

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def test_the_quickstart_runs_and_ends_at_the_edges(tmp_path: Path) -> None:
    pairs = sharpness_and_edge(run_page(README, tmp_path))
    assert len(pairs) == 2
    for sharpness, edge in pairs:
        assert sharpness == pytest.approx(edge, rel=0.05)
    assert pairs == sorted(pairs, reverse=True)  # USAM's minimum is the flatter one
    assert pairs[0][1] == 4.0  # 2 / lr


def test_the_home_page_has_the_same_quickstart() -> None:
    assert blocks_of(DOCS / "index.md") == blocks_of(README)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("module", ["curvature", "filters", "kernels", "optimizers"])
def test_the_api_reference_has_every_public_name(module: str) -> None:
    listed = re.findall(r"^::: eigenfilter\.(\S+)$", _reference(), re.MULTILINE)
    public = import_module(f"eigenfilter.{module}").__all__
    assert {f"{module}.{name}" for name in public} <= set(listed)


def test_the_api_reference_has_what_the_package_exports() -> None:
    package = import_module("eigenfilter")
    exported = [name for name in package.__all__ if not ismodule(getattr(package, name))]
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", _reference(), re.M)}
    assert set(exported) <= listed


def test_the_gallery_shows_every_figure() -> None:
    gallery = (DOCS / "gallery.md").read_text()
    for figure in (DOCS / "figures").glob("*.png"):
        assert f"](figures/{figure.name})" in gallery


def _reference() -> str:
    return "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
