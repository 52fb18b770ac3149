"""Measure the library beside its peers, by the benchmarks of a checkout.

They come with the sources and not with the package: `python -m benchmarks` runs them there, too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from eigenfilter.experiments.errors import UserError

HELP = "verify and time the library beside its peers; measure memory; draw the results"
MARK = Path("csrc", "core")  # of a checkout, and of no other project
ELSEWHERE = (
    "the benchmarks come with the sources, not with the package: run this in a checkout of "
    "eigenfilter, or there `python -m benchmarks`"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Take whatever follows: the benchmarks read it once they are wanted."""
    parser.prefix_chars = ""  # so that --help is theirs, too
    parser.add_argument("arguments", nargs="*")


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks.

    Raises:
        UserError: they are not here.
    """
    root = _checkout()
    if root is None:
        raise UserError(ELSEWHERE)
    sys.path.insert(0, str(root))
    command = importlib.import_module("benchmarks.command")
    code: int = command.main(args.arguments)
    return code


def _checkout() -> Path | None:
    """The checkout that this module is in, or the one whose root is the current folder."""
    for root in (Path(__file__).parents[3], Path.cwd()):
        if (root / "benchmarks" / "command.py").exists() and (root / MARK).exists():
            return root
    return None
