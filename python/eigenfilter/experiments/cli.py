"""The command line: `eigenfilter COMMAND`.

A command is a module with `HELP`, `configure(parser)` and `run(args)`, which returns the exit code.
Commands import optional dependencies inside their functions, so that `--help` works without them.
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
from eigenfilter.experiments.cli_arguments import add_commands
from eigenfilter.experiments.errors import UserError, one_line
from eigenfilter.experiments.processes import claim_first_failure, is_distributed

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


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        text = one_line(f"{self.prog}: error: {message} (see {self.prog} --help)")
        self.exit(2, f"{text}\n" if claim_first_failure() else None)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = OneLineParser(prog="eigenfilter", description="Optimizers as eigenvalue filters.")
    parser.add_argument("--version", action="version", version=__version__)
    add_commands(parser, "command", _COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code of the command: 0 on success, 2 on bad input or if an optional dependency is
        missing.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain any bytes
    args = build_parser().parse_args(argv)
    try:
        if is_distributed() and args.command != "train":
            raise UserError("torchrun works with train only; start this command without it")
        code: int = _COMMANDS[args.command].run(args)
    except UserError as error:
        if claim_first_failure():
            print(
                f"eigenfilter {args.command}: error: {one_line(error)}", file=sys.stderr, flush=True
            )
        return 2
    return code
