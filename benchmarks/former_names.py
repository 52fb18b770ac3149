"""Names that older result files have, and what the same things are called now.

Committed results are never edited; whoever reads one passes it through `with_current_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CURRENT_NAMES: Mapping[str, str] = {
    # Kernels, in the rows of `bench host` and, followed by a dtype or a number, of `bench`.
    "ascend": "perturb",
    "ascend_again": "perturb_unsaved",
    "perturb_again": "perturb_unsaved",
    "ascend_hvp": "perturb_hvp",
    "descend": "sgd_step",
    "descend_adamw": "adamw_step",
    "project-out": "orthogonalize",
    "three-term": "lanczos-step",
    "orthonormalise": "cholesky-qr",
    # Solvers and their settings.
    "eigenfilter, no copies": "eigenfilter, without the multiplicity check",
    "look_for_copies=False": "check_multiplicity=False",
    # The key of how many cores other processes kept busy.
    "neighbours": "busy_cores",
}


def with_current_names(value: Any) -> Any:
    """Return parsed JSON with current names, in keys and in strings, at every depth."""
    if isinstance(value, dict):
        return {_current(key): with_current_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_current_names(item) for item in value]
    return _current(value) if isinstance(value, str) else value


def _current(name: str) -> str:
    """The current name; a benchmark's may end in "-float32" or "-8"."""
    if name in CURRENT_NAMES:
        return CURRENT_NAMES[name]
    stem, dash, ending = name.rpartition("-")
    return CURRENT_NAMES.get(stem, stem) + dash + ending
