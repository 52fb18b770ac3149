"""The README and the docs: examples run, links and names lead somewhere, nothing is missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import ismodule
from pathlib import Path

import pytest

from benchmarks import command as bench
from eigenfilter.experiments.cli import OneLineParser, build_parser
from generated import fill
from pages import ROOT, blocks_of, run_page, sharpness_and_edge

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# What git, a build or a run writes.
NOT_OF_CHECKOUT = (".git", ".venv", "build", "dist", "out", "runs")
SOURCE = re.compile(r"\.(py|pyi|cpp|hpp|cu|cuh|toml|sh|cff)$")


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


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@each_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """A page may leave out the folders of a file."""
    for path in paths_in(page.read_text()):
        assert path in paths_of_checkout(), path


def test_paths_are_told_from_other_code() -> None:
    page = "`csrc/cpu`, `simd.hpp`; `out/run`, `summary.md`, `ef.USAM`, `a/b is no path`, `1 / lr`"
    assert list(paths_in(page)) == ["csrc/cpu", "simd.hpp"]
    assert {"csrc/cpu", "cpu/simd.hpp", "simd.hpp"} <= paths_of_checkout()
    assert not {"csrc/cpu/loop.cpp", "md.hpp"} & paths_of_checkout()


def paths_in(text: str) -> Iterator[str]:
    """Yield what looks like a path of the checkout, without a test's name."""
    for code in re.findall(r"`([^`\n]+)`", text):
        path = code.partition("::")[0].rstrip("/")
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)*", path) and ("/" in path or SOURCE.search(path))
        if is_path and path.partition("/")[0] not in NOT_OF_CHECKOUT:
            yield path


@cache
def paths_of_checkout() -> set[str]:
    """Return all files and folders, each also without some of its first folders."""
    tops = [top for top in ROOT.iterdir() if top.name not in NOT_OF_CHECKOUT]
    paths = set()
    for path in (*tops, *(path for top in tops for path in top.rglob("*"))):
        parts = path.relative_to(ROOT).parts
        paths |= {"/".join(parts[start:]) for start in range(len(parts))}
    return paths


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in re.findall(r"(?:^|`|run: |&& )make ([a-z][a-z -]*)", page.read_text(), re.M):
        assert set(words.split()) <= set(targets), words


@each_page
def test_every_command_that_a_page_shows_has_its_arguments(page: Path) -> None:
    for line in commands_in(page.read_text()):
        words = shlex.split(line, comments=True)
        parser = build_parser()
        if words[:1] == ["bench"]:
            parser, words = OneLineParser(prog="eigenfilter bench"), words[1:]
            bench.configure(parser)
        parser.parse_args(words)


def test_commands_are_told_from_other_lines() -> None:
    page = """`eigenfilter sweep`
```bash
pip install eigenfilter
eigenfilter train run.yaml \\
  --seed 1
torchrun -m eigenfilter train run.yaml  # on all GPUs
```
"""
    commands = [shlex.split(line, comments=True) for line in commands_in(page)]
    assert commands == [["train", "run.yaml", "--seed", "1"], ["train", "run.yaml"]]


def commands_in(text: str) -> Iterator[str]:
    """Yield the arguments of `eigenfilter` in the blocks of commands of a page."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^|/| -m )eigenfilter (.*)", line):
                yield match[1]


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
    return "\n".join(fill(page.read_text()) for page in sorted((DOCS / "api").glob("*.md")))
