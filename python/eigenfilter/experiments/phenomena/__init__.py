"""Reproduce a phenomenon of the filters: train, print what was measured, draw it.

Everything is full batch. Each phenomenon writes a figure and results.json into --out, and says in
its table where the theory does not describe what happened.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import ModuleType

from eigenfilter.experiments.cli_arguments import add_commands
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.phenomena import late, moving_edge, saddle, sharpening

HELP = "sharpening to the edge, saddles, a late switch to USAM, an edge that moves"

_PHENOMENA: Mapping[str, ModuleType] = {
    "sharpening": sharpening,
    "saddle": saddle,
    "late": late,
    "moving-edge": moving_edge,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a command for each phenomenon."""
    add_commands(parser, "phenomenon", _PHENOMENA)


def run(args: argparse.Namespace) -> int:
    """Reproduce the phenomenon; return the exit code."""
    with folder_lock(args.out, "phenomenon"):
        code: int = _PHENOMENA[args.phenomenon].run(args)
    return code
