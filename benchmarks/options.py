"""The options that the tables of `eigenfilter bench` share: how they are added and read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eigenfilter.experiments.cli_arguments import whole
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.locks import folder_lock

OUT = Path("out/bench")
AS_TIME_ALLOWS = "as many as a few seconds allow"


def add_table(
    tables: Any,
    name: str,
    summary: str,
    description: str | None,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Add a table; `run` measures it and returns the exit code."""
    parser: argparse.ArgumentParser = tables.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(table=name, run_table=run)
    return parser


def add_only(parser: argparse.ArgumentParser, text: str, default: Any = argparse.SUPPRESS) -> None:
    """Add --only, which chooses rows of a table."""
    parser.add_argument("--only", action="append", metavar="NAME", help=text, default=default)


def add_repeat(
    parser: argparse.ArgumentParser, default_rounds: str, default: Any = argparse.SUPPRESS
) -> None:
    """Add --repeat, the number of rounds."""
    parser.add_argument(
        "--repeat",
        type=whole(1),
        metavar="N",
        help=f"rounds of timing (default: {default_rounds})",
        default=default,
    )


def add_device(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    """Add --device, the CPU or the current GPU."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=default,
        help="the device to run on (default: cpu)",
    )


def add_out(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    """Add --out, the folder for the results.

    The options of a table have no default, as it would override a value that stands before the
    table's name.
    """
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="DIR",
        help=f"folder for the results (default: {OUT})",
    )


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device that --device names.

    Raises:
        UserError: there is no such device.
    """
    if args.device != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def locked_folder(args: argparse.Namespace) -> Path:
    """Return the folder for the results, which this command keeps locked until it ends."""
    folder: Path = args.enter_context(folder_lock(args.out or OUT, "benchmark"))
    return folder


def refuse(args: argparse.Namespace, *options: str) -> None:
    """Raise UserError if one of these options was given: the table does not have it."""
    for option in options:
        if getattr(args, option) is not None:
            raise UserError(f"--{option} does not go with {args.table}")
