"""The location in the user's code that a warning should show."""

from __future__ import annotations

import sys
from types import FrameType

_INNER = ("eigenfilter", "torch", "copy", "pickle")


def stacklevel() -> int:
    """The `stacklevel` of the nearest frame outside this library, torch and copying."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and _package(frame) in _INNER:
        frame = frame.f_back
        level += 1
    return level


def _package(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
