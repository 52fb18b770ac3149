"""Reproduce a phenomenon of the filters: train, print the measurements, and draw them.

All training is full-batch. Each phenomenon writes a figure and results.json into --out. Its table
shows where the theory does not describe the outcome.
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
    """Run the chosen phenomenon; return the exit code."""
    with folder_lock(args.out, "phenomenon"):
        code: int = _PHENOMENA[args.phenomenon].run(args)
    return code
