"""Measure the library beside its peers, by the benchmarks of a checkout.

They come with the sources and not with the package: `python -m benchmarks` runs them there, too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from eigenfilter.experiments.errors import UserError

HELP = "verify and time the library beside its peers; measure memory; draw the results"
ELSEWHERE = (
    "the benchmarks come with the sources, not with the package: run this in a checkout of "
    "eigenfilter, or there `python -m benchmarks`"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that the benchmarks take, where they are."""
    command = _command()
    if command is None:
        parser.prefix_chars = ""  # whatever is asked for, --help too, `run` says where they are
        parser.add_argument("arguments", nargs="*")
        return
    parser.description = command.__doc__
    command.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks.

    Raises:
        UserError: they are not here.
    """
    command = _command()
    if command is None:
        raise UserError(ELSEWHERE)
    code: int = command.run(args)
    return code


def _command() -> ModuleType | None:
    """The benchmarks' command, of the checkout that this module or the current folder is in."""
    for root in (Path(__file__).parents[3], Path.cwd()):
        if (root / "benchmarks" / "command.py").exists() and (root / "csrc").exists():
            if str(root) not in sys.path:
                sys.path.append(str(root))
            return importlib.import_module("benchmarks.command")
    return None
