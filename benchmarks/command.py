"""Measure the library beside what people use now, on this machine.

Without a TABLE it times the benchmarks: each one is verified first, then timed in turns with its
peers. The exit code is 1 if a verification fails, and 2 on bad input. A missed goal is reported but
is no error, since a busy machine is enough to miss one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    finite_differences,
    host,
    loop,
    memory,
    monitor,
    native_stub,
    page,
    registry,
    runner,
    scale,
    smoke,
    triton_blocks,
)
from benchmarks.curvature import run as curvature
from benchmarks.curvature.problem_data import FOLDER
from eigenfilter import kernels
from eigenfilter.experiments import networks
from eigenfilter.experiments.cli import OneLineParser
from eigenfilter.experiments.cli_arguments import add_data_dir, whole
from eigenfilter.experiments.errors import UserError, require
from eigenfilter.experiments.locks import folder_lock

OUT = Path("out/bench")
AS_TIME_ALLOWS = "as many as a few seconds allow"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command and of its tables."""
    parser.set_defaults(table=None, run_table=_timings)
    _add_only(parser, "a benchmark, or a pattern such as 'usam-*'; may be repeated", None)
    _add_repeat(parser, AS_TIME_ALLOWS, None)
    parser.add_argument(
        "--list", action="store_true", default=None, help="list the benchmarks and exit"
    )
    _add_device(parser, None)
    _add_out(parser, None)
    tables = parser.add_subparsers(metavar="TABLE", title="tables, instead of timings")
    _configure_memory(tables)
    _configure_finite_differences(tables)
    _configure_host(tables)
    _configure_triton_blocks(tables)
    _configure_curvature(tables)
    _configure_monitor(tables)
    _configure_loop(tables)
    _configure_scale(tables)
    _configure_smoke(tables)
    _configure_page(tables)


def _add_table(
    tables: Any,
    name: str,
    summary: str,
    description: str | None,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Add a table, which `run` measures or writes."""
    parser: argparse.ArgumentParser = tables.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(table=name, run_table=run)
    return parser


def _configure_memory(tables: Any) -> None:
    parser = _add_table(
        tables, "memory", "the peak memory of a training step", memory.__doc__, _memory
    )
    parser.add_argument(
        "--elements",
        type=whole(memory.TENSORS),
        default=memory.ELEMENTS,
        metavar="N",
        help="parameters of the model (default: %(default)s)",
    )
    _add_device(parser)
    _add_out(parser)


def _configure_finite_differences(tables: Any) -> None:
    parser = _add_table(
        tables,
        "finite-differences",
        "the error of Hessian-vector products by finite differences, on the CPU",
        finite_differences.__doc__,
        _finite_differences,
    )
    _add_out(parser)


def _configure_host(tables: Any) -> None:
    parser = _add_table(
        tables,
        "host",
        "what a launch costs the host, on a machine without a GPU",
        host.__doc__,
        _host,
    )
    _add_only(parser, f"a backend, from {', '.join(host.BACKENDS)}; may be repeated")
    parser.add_argument(
        "--extension",
        type=Path,
        default=native_stub.EXTENSION,
        metavar="FILE",
        help="the extension without launches, which make bench-host builds (default: %(default)s)",
    )
    _add_repeat(parser, AS_TIME_ALLOWS)
    _add_out(parser)


def _configure_triton_blocks(tables: Any) -> None:
    parser = _add_table(
        tables,
        "triton-blocks",
        "the best block sizes for the Triton kernels, on a GPU",
        triton_blocks.__doc__,
        _triton_blocks,
    )
    _add_device(parser)
    parser.add_argument(
        "--save", action="store_true", help="save the best choices for later processes"
    )
    _add_out(parser)


def _configure_curvature(tables: Any) -> None:
    parser = _add_table(
        tables,
        "curvature",
        "the largest eigenpairs of Hessians, on the CPU",
        curvature.__doc__,
        _curvature,
    )
    names = ", ".join(curvature.names())
    _add_only(parser, f"a problem, from {names}, or a pattern; may be repeated")
    _add_repeat(parser, str(curvature.ROUNDS))
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="folder of the data (default: EIGENFILTER_DATA, or a folder in ~/.cache)",
    )
    _add_out(parser)


def _configure_monitor(tables: Any) -> None:
    parser = _add_table(
        tables, "monitor", "what SharpnessMonitor costs, on the CPU", monitor.__doc__, _monitor
    )
    names = ", ".join(monitor.TRAININGS)
    _add_only(parser, f"a network, from {names}, or a pattern; may be repeated")
    _add_repeat(parser, str(monitor.ROUNDS))
    _add_out(parser)


def _configure_loop(tables: Any) -> None:
    parser = _add_table(
        tables, "loop", "images a second in training, beside torch.optim.SGD", loop.__doc__, _loop
    )
    parser.add_argument(
        "--model",
        default=loop.MODEL,
        metavar="NAME",
        help=f"{networks.HELP} (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=loop.BATCH,
        metavar="N",
        help="samples of a batch (default: %(default)s)",
    )
    add_data_dir(parser)
    _add_device(parser)
    _add_repeat(parser, str(loop.ROUNDS))
    _add_out(parser)


def _configure_scale(tables: Any) -> None:
    parser = _add_table(
        tables, "scale", "the memory and time of eigsh by dimension", scale.__doc__, _scale
    )
    parser.add_argument(
        "--largest",
        type=whole(scale.SIZES[0]),
        default=scale.SIZES[-1],
        metavar="N",
        help="the largest dimension; 1e8 takes 6 GB (default: %(default)s)",
    )
    _add_out(parser)


def _configure_smoke(tables: Any) -> None:
    parser = _add_table(
        tables, "smoke", "every kernel once, against the reference", smoke.__doc__, _smoke
    )
    _add_device(parser)
    _add_only(parser, f"a backend, from {', '.join(kernels.BACKENDS)}; may be repeated")
    sizes = ", ".join(map(str, smoke.SIZES))
    parser.add_argument(
        "--size",
        type=whole(1),
        action="append",
        metavar="N",
        help=f"elements of a tensor; may be repeated (default: {sizes})",
    )
    _add_out(parser)


def _configure_page(tables: Any) -> None:
    parser = _add_table(
        tables, "page", "a page with figures, from result files", page.__doc__, _page
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="RESULTS.json",
        help="JSON files that eigenfilter bench wrote",
    )
    _add_out(parser)


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
    device = _device(args)
    return 0 if runner.run(benchmarks, device, args.repeat, _folder(args)) else 1


def _memory(args: argparse.Namespace) -> int:
    _refuse(args, "only", "repeat", "list")
    memory.run(args.elements, _device(args), _folder(args))
    return 0


def _finite_differences(args: argparse.Namespace) -> int:
    _refuse(args, "only", "repeat", "list", "device")
    require("sklearn")
    finite_differences.run(_folder(args))
    return 0


def _host(args: argparse.Namespace) -> int:
    _refuse(args, "list", "device")
    backends = args.only or list(host.BACKENDS)
    for name in backends:
        if name not in host.BACKENDS:
            raise UserError(f"no launches of {name!r}: choose from {', '.join(host.BACKENDS)}")
    if "triton" in backends:
        require("triton")
    if "native" in backends and not native_stub.is_loaded():
        if not args.extension.exists():
            raise UserError(
                f"{args.extension} is not there: run make bench-host, which builds it, or give "
                "--only triton to leave the native launches out"
            )
        only = [word for name in backends for word in ("--only", name)]
        repeat = [] if args.repeat is None else ["--repeat", str(args.repeat)]
        out = ["--out", str(args.out or OUT)]
        return native_stub.run(args.extension, ["bench", "host", *only, *repeat, *out])
    host.run(backends, args.repeat, _folder(args))
    return 0


def _triton_blocks(args: argparse.Namespace) -> int:
    _refuse(args, "only", "repeat", "list")
    device = _device(args)
    if device.type == "cpu":
        raise UserError("triton-blocks times a GPU: give --device cuda")
    require("triton")
    try:
        triton_blocks.run(device, _folder(args), args.save)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _curvature(args: argparse.Namespace) -> int:
    _refuse(args, "list", "device")
    require("sklearn", "scipy", "threadpoolctl")
    try:
        names = curvature.select(args.only or [])
    except ValueError as error:
        raise UserError(str(error)) from error
    curvature.run(names, args.data_dir, args.repeat or curvature.ROUNDS, _folder(args))
    return 0


def _monitor(args: argparse.Namespace) -> int:
    _refuse(args, "list", "device")
    require("sklearn")
    try:
        names = monitor.select(args.only or [])
    except ValueError as error:
        raise UserError(str(error)) from error
    monitor.run(names, args.repeat or monitor.ROUNDS, _folder(args))
    return 0


def _loop(args: argparse.Namespace) -> int:
    _refuse(args, "only", "list")
    try:
        loop.run(
            args.model,
            args.batch_size,
            args.data_dir,
            _device(args),
            args.repeat or loop.ROUNDS,
            _folder(args),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _scale(args: argparse.Namespace) -> int:
    _refuse(args, "only", "repeat", "list", "device")
    scale.run(args.largest, _folder(args))
    return 0


def _smoke(args: argparse.Namespace) -> int:
    _refuse(args, "repeat", "list")
    device = _device(args)
    only = args.only or []
    for name in only:
        if name not in smoke.backends(device):
            choices = ", ".join(smoke.backends(device))
            raise UserError(f"no backend {name!r} serves {device}: choose one of {choices}")
    failures = smoke.run(device, only, args.size or smoke.SIZES, _folder(args))
    return 1 if failures else 0


def _page(args: argparse.Namespace) -> int:
    _refuse(args, "only", "repeat", "list", "device")
    require("matplotlib")
    try:
        page.write(args.files, _folder(args))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _add_only(parser: argparse.ArgumentParser, text: str, default: Any = argparse.SUPPRESS) -> None:
    parser.add_argument("--only", action="append", metavar="NAME", help=text, default=default)


def _add_repeat(
    parser: argparse.ArgumentParser, default_rounds: str, default: Any = argparse.SUPPRESS
) -> None:
    parser.add_argument(
        "--repeat",
        type=whole(1),
        metavar="N",
        help=f"rounds of timing (default: {default_rounds})",
        default=default,
    )


def _add_device(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=default,
        help="the device to run on (default: cpu)",
    )


def _add_out(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    """Add --out; in a table, without a default that would override a value before its name."""
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="DIR",
        help=f"folder for the results (default: {OUT})",
    )


def _device(args: argparse.Namespace) -> torch.device:
    if args.device != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def _folder(args: argparse.Namespace) -> Path:
    """The folder for the results, locked for this command until it ends."""
    folder: Path = args.enter_context(folder_lock(args.out or OUT, "benchmark"))
    return folder


def _refuse(args: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(args, option) is not None:
            raise UserError(f"--{option} does not go with {args.table}")
