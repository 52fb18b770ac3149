"""The command line: `eigenfilter COMMAND`.

A command is a module with `HELP`, `configure(parser)` and `run(args)`, which returns the exit code;
it imports what only the experiments need inside its functions, so that `--help` works without them.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from eigenfilter import __version__
from eigenfilter.experiments import (
    bench,
    certify,
    demo,
    filter,
    phenomena,
    reproduce,
    spectrum,
    sweep,
    train,
)
from eigenfilter.experiments.arguments import add_commands
from eigenfilter.experiments.errors import UserError, line
from eigenfilter.experiments.processes import first_to_fail, several

_COMMANDS: Mapping[str, ModuleType] = {
    "demo": demo,
    "filter": filter,
    "train": train,
    "sweep": sweep,
    "spectrum": spectrum,
    "certify": certify,
    "phenomena": phenomena,
    "reproduce": reproduce,
    "bench": bench,
}


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        text = line(f"{self.prog}: error: {message} (see {self.prog} --help)")
        self.exit(2, f"{text}\n" if first_to_fail() else None)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = _Parser(prog="eigenfilter", description="Optimizers as eigenvalue filters.")
    parser.add_argument("--version", action="version", version=__version__)
    add_commands(parser, "command", _COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        What the command returns: 0 if it did its work; 2 on bad input or where an optional
        dependency is missing.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have any bytes
    args = build_parser().parse_args(argv)
    try:
        if several() and args.command != "train":
            raise UserError("torchrun shares a run of train only: start this command without it")
        code: int = _COMMANDS[args.command].run(args)
    except UserError as error:
        if first_to_fail():
            print(f"eigenfilter {args.command}: error: {line(error)}", file=sys.stderr, flush=True)
        return 2
    return code
