"""The parts of pages that the code writes: {{ eigenfilter.module.function() }}, alone on a line."""

from __future__ import annotations

import re
from importlib import import_module

CALL = re.compile(r"^\{\{ (eigenfilter[\w.]*)\.(\w+)\(\) \}\}$", re.MULTILINE)


def fill(markdown: str) -> str:
    """Put what each of these functions returns in place of its call."""
    return CALL.sub(lambda call: getattr(import_module(call[1]), call[2])(), markdown)
