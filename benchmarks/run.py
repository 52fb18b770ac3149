"""Run benchmarks: verify, then time, then write the results.

    python -m benchmarks.run [--only NAME] [--device cpu|cuda] [--repeat N] [--out DIR] [--list]

Exit code 1 if a check is red, 2 on bad input. A goal that is missed is reported, and no error: a
busy machine is enough to miss one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import environment, registry, report
from benchmarks.measure import Result, measure

RESULTS = Path(__file__).parent / "results"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a benchmark, or a pattern such as 'usam-*'; may be repeated",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeat", type=_count, help="rounds of timing (default: by time)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        benchmarks = registry.select(args.only)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for benchmark in benchmarks:
            print(f"{benchmark.name:24} {benchmark.summary}")
        return 0
    device = torch.device("cpu")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device())

    found = environment.describe(device)
    print("\n".join(report.HEADER))
    results: list[Result] = []
    for benchmark in benchmarks:
        for setting in registry.settings(device):
            results.append(measure(benchmark, setting, repeat=args.repeat))
            print("\n".join(report.lines(results[-1])), flush=True)
    for path in report.write(args.out, args.device, found, results):
        print(f"wrote {path}")
    return 1 if any(result.timing is None for result in results) else 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
