"""Measure the library beside what people use now, on this machine.

Without a TABLE it times the benchmarks: each one is verified first, then timed in turns with its
peers. The exit code is 1 if a verification fails, and 2 on bad input. A missed goal is reported but
is no error, since a busy machine is enough to miss one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks import registry, runner, tables
from benchmarks.options import (
    AS_TIME_ALLOWS,
    add_device,
    add_only,
    add_out,
    add_repeat,
    device_of,
    locked_folder,
)
from eigenfilter.experiments.cli import OneLineParser
from eigenfilter.experiments.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command and of its tables."""
    parser.set_defaults(table=None, run_table=_timings)
    add_only(parser, "a benchmark, or a pattern such as 'usam-*'; may be repeated", None)
    add_repeat(parser, AS_TIME_ALLOWS, None)
    parser.add_argument(
        "--list", action="store_true", default=None, help="list the benchmarks and exit"
    )
    add_device(parser, None)
    add_out(parser, None)
    tables.configure(parser.add_subparsers(metavar="TABLE", title="tables, instead of timings"))


def main(arguments: Sequence[str]) -> int:
    """Measure what the arguments name; return the exit code.

    Raises:
        UserError: it cannot be measured; the message says why.
    """
    parser = OneLineParser(
        prog="eigenfilter bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configure(parser)
    args = parser.parse_args(arguments)
    with ExitStack() as contexts:
        args.enter_context = contexts.enter_context
        code: int = args.run_table(args)
    return code


def _timings(args: argparse.Namespace) -> int:
    try:
        benchmarks = registry.select(args.only or [])
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.list:
        for benchmark in benchmarks:
            print(f"{benchmark.name:24} {benchmark.summary}")
        return 0
    device = device_of(args)
    return 0 if runner.run(benchmarks, device, args.repeat, locked_folder(args)) else 1
