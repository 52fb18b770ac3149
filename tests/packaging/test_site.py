"""The hooks of the documentation fill pages, draw formulas, link names and refuse bad pages."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from eigenfilter.kernels import _op
from pages import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")

from mkdocs.exceptions import PluginError


@pytest.fixture
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "_site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.entries |= {
        "eigenfilter.optimizers.USAM": "api/optimizers.md",
        "eigenfilter.filters.USAM": "api/filters.md",
        "eigenfilter.kernels.norm": "api/kernels.md",
        "eigenfilter.curvature.eigsh": "api/curvature.md",
    }
    return module


def page(path: str) -> Any:
    return SimpleNamespace(file=SimpleNamespace(src_uri=path))


def test_the_code_writes_parts_of_pages(hooks: ModuleType) -> None:
    call = "{{ eigenfilter.kernels._op.table() }}"
    kernels = page("api/kernels.md")
    kernels.parent, kernels.meta = "API reference", {}
    written = hooks.on_page_markdown(f"# Kernels\n\n{call}\n\nNot {call}.", kernels, None)
    assert written == f"# Kernels\n\n{_op.table()}\n\nNot {call}."


def test_a_formula_becomes_mathml(hooks: ModuleType) -> None:
    output = hooks.on_page_content(
        r'<span class="arithmatex">\(\lambda &lt; 2\)</span>', page("theory.md")
    )
    assert output.startswith('<span class="formula"><math')
    assert "<mo>&#x0003C;</mo>" in output
    assert "\\" not in output


def test_an_unknown_command_is_refused(hooks: ModuleType) -> None:
    with pytest.raises(PluginError, match="nonsense"):
        hooks.on_page_content(r'<div class="arithmatex">\[\nonsense{x}\]</div>', page("theory.md"))


@pytest.mark.parametrize(
    ("path", "name", "link"),
    [
        ("index.md", "ef.USAM", "api/optimizers.html#eigenfilter.optimizers.USAM"),
        ("index.md", "USAM", "api/optimizers.html#eigenfilter.optimizers.USAM"),
        ("index.md", "filters.USAM", "api/filters.html#eigenfilter.filters.USAM"),
        ("api/filters.md", "USAM", "filters.html#eigenfilter.filters.USAM"),
        (
            "reproduction/mnist.md",
            "curvature.eigsh",
            "../api/curvature.html#eigenfilter.curvature.eigsh",
        ),
        ("index.md", "norm", None),
        ("index.md", "torch.optim.SGD", None),
    ],
)
def test_names_lead_to_the_reference(
    hooks: ModuleType, path: str, name: str, link: str | None
) -> None:
    code = f"<code>{name}</code>"
    expected = code if link is None else f'<a href="{link}">{code}</a>'
    assert hooks.on_page_content(f"<p>{code}</p>", page(path)) == f"<p>{expected}</p>"
    heading = f"<h2>{code}</h2>"
    assert hooks.on_page_content(heading, page(path)) == heading


@pytest.mark.parametrize(
    "tag",
    ['<script src="https://cdn.org/x.js">', '<link rel="stylesheet" href="https://cdn.org/x.css">'],
)
def test_a_page_that_loads_from_elsewhere_is_refused(hooks: ModuleType, tag: str) -> None:
    with pytest.raises(PluginError, match="elsewhere"):
        hooks.on_post_page(tag, page("index.md"))


def test_a_page_may_link_elsewhere(hooks: ModuleType) -> None:
    text = '<a href="https://arxiv.org">paper</a><script src="assets/x.js"></script>'
    assert hooks.on_post_page(text, page("index.md")) == text
