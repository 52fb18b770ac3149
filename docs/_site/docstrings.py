"""Docstrings as the code writes them, in the forms that Griffe's Google style knows."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

from eigenfilter.optimizers.hyperparameters import explain_options

# Examples below a title of one example, or below none.
TITLE = re.compile(r"^Example:$", re.MULTILINE)
UNTITLED = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)
# Several arguments that share their words: "q, w: rows [m, n]".
SHARED = re.compile(r"^(    )(\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
# "lr: > 0", which Markdown would take for a quotation.
GREATER = re.compile(r"^(    \w+: )>", re.MULTILINE)


class Sections(griffe.Extension):
    """Give every example a section, and every argument an entry of its own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = explain_options(obj.docstring.value) or ""  # as help() shows it
            text = TITLE.sub("Examples:", text)
            text = UNTITLED.sub(_titled, text)
            text = SHARED.sub(_apart, text)
            obj.docstring.value = GREATER.sub(r"\1\>", text)


def _titled(examples: re.Match[str]) -> str:
    return "Examples:\n" + textwrap.indent(examples[0], "    ")


def _apart(shared: re.Match[str]) -> str:
    indent, names, words = shared.groups()
    return "\n".join(f"{indent}{name}: {words}" for name in names.split(", "))
