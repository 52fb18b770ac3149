"""Where in the user's code something came about, for warnings."""

from __future__ import annotations

import sys

_OURS = ("eigenfilter", "torch")


def stacklevel() -> int:
    """The `stacklevel` of the nearest frame that is neither this library's nor torch's."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame = frame.f_back
        level += 1
    return level
