"""Command-line arguments that several commands share, and parsers of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType


def positive(text: str) -> float:
    """Parse a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Return a parser of integers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, got {text!r}"
            )
        return value

    return parse


def add_out(parser: argparse.ArgumentParser, default: str, files: str) -> None:
    """Add --out, the folder for the output files."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help=f"folder for {files} (default: %(default)s)",
    )


def add_data_dir(parser: argparse._ActionsContainer, of: str = "the data") -> None:
    """Add --data-dir, the folder of `of`, to a parser or an argument group."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help=f"folder of {of} (default: EIGENFILTER_DATA, else ~/.cache/eigenfilter/data)",
    )


def add_device(parser: argparse.ArgumentParser, auto: str = "a GPU") -> None:
    """Add --device, for `device_of`; `auto` describes the default if there is a GPU."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help=f"cpu, cuda, cuda:1 (default: {auto} if there is one, else cpu)",
    )


def add_training(parser: argparse.ArgumentParser, *, steps: int, of: str, budget: float) -> None:
    """Add --seed, --steps and --budget of full-batch training.

    Args:
        parser: the parser.
        steps: default number of steps.
        of: description of --steps.
        budget: default time limit in minutes.
    """
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="seed of the initial weights (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=whole(1),
        default=steps,
        metavar="N",
        help=f"{of} (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        default=budget,
        metavar="MINUTES",
        help="time limit of all runs together (default: %(default)s)",
    )


def add_commands(
    parser: argparse.ArgumentParser, dest: str, modules: Mapping[str, ModuleType]
) -> None:
    """Add a subcommand for each module, which has `HELP` and `configure(parser)`.

    Args:
        parser: the parser.
        dest: attribute of the parsed arguments that gets the name of the chosen command.
        modules: the modules by the names of their commands.
    """
    commands = parser.add_subparsers(dest=dest, metavar=dest.upper(), required=True)
    for name, module in modules.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(command)
