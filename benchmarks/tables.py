"""The tables of `eigenfilter bench`: the arguments of each, and the function that runs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import (
    finite_differences,
    host,
    loop,
    memory,
    monitor,
    native_stub,
    page,
    scale,
    smoke,
    triton_blocks,
)
from benchmarks.curvature import run as curvature
from benchmarks.curvature.problem_data import FOLDER
from benchmarks.options import (
    AS_TIME_ALLOWS,
    OUT,
    add_device,
    add_only,
    add_out,
    add_repeat,
    add_table,
    device_of,
    locked_folder,
    refuse,
)
from eigenfilter import kernels
from eigenfilter.experiments import networks
from eigenfilter.experiments.cli_arguments import add_data_dir, whole
from eigenfilter.experiments.errors import UserError, require


def configure(tables: Any) -> None:
    """Add every table with its arguments."""
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


def _configure_memory(tables: Any) -> None:
    parser = add_table(
        tables, "memory", "the peak memory of a training step", memory.__doc__, _memory
    )
    parser.add_argument(
        "--elements",
        type=whole(memory.TENSORS),
        default=memory.ELEMENTS,
        metavar="N",
        help="parameters of the model (default: %(default)s)",
    )
    add_device(parser)
    add_out(parser)


def _memory(args: argparse.Namespace) -> int:
    refuse(args, "only", "repeat", "list")
    memory.run(args.elements, device_of(args), locked_folder(args))
    return 0


def _configure_finite_differences(tables: Any) -> None:
    parser = add_table(
        tables,
        "finite-differences",
        "the error of Hessian-vector products by finite differences, on the CPU",
        finite_differences.__doc__,
        _finite_differences,
    )
    add_out(parser)


def _finite_differences(args: argparse.Namespace) -> int:
    refuse(args, "only", "repeat", "list", "device")
    require("sklearn")
    finite_differences.run(locked_folder(args))
    return 0


def _configure_host(tables: Any) -> None:
    parser = add_table(
        tables,
        "host",
        "what a launch costs the host, on a machine without a GPU",
        host.__doc__,
        _host,
    )
    add_only(parser, f"a backend, from {', '.join(host.BACKENDS)}; may be repeated")
    parser.add_argument(
        "--extension",
        type=Path,
        default=native_stub.EXTENSION,
        metavar="FILE",
        help="the extension without launches, which make bench-host builds (default: %(default)s)",
    )
    add_repeat(parser, AS_TIME_ALLOWS)
    add_out(parser)


def _host(args: argparse.Namespace) -> int:
    refuse(args, "list", "device")
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
    host.run(backends, args.repeat, locked_folder(args))
    return 0


def _configure_triton_blocks(tables: Any) -> None:
    parser = add_table(
        tables,
        "triton-blocks",
        "the best block sizes for the Triton kernels, on a GPU",
        triton_blocks.__doc__,
        _triton_blocks,
    )
    add_device(parser)
    parser.add_argument(
        "--save", action="store_true", help="save the best choices for later processes"
    )
    add_out(parser)


def _triton_blocks(args: argparse.Namespace) -> int:
    refuse(args, "only", "repeat", "list")
    device = device_of(args)
    if device.type == "cpu":
        raise UserError("triton-blocks times a GPU: give --device cuda")
    require("triton")
    try:
        triton_blocks.run(device, locked_folder(args), args.save)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _configure_curvature(tables: Any) -> None:
    parser = add_table(
        tables,
        "curvature",
        "the largest eigenpairs of Hessians, on the CPU",
        curvature.__doc__,
        _curvature,
    )
    names = ", ".join(curvature.names())
    add_only(parser, f"a problem, from {names}, or a pattern; may be repeated")
    add_repeat(parser, str(curvature.ROUNDS))
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="folder of the data (default: EIGENFILTER_DATA, or a folder in ~/.cache)",
    )
    add_out(parser)


def _curvature(args: argparse.Namespace) -> int:
    refuse(args, "list", "device")
    require("sklearn", "scipy", "threadpoolctl")
    try:
        names = curvature.select(args.only or [])
    except ValueError as error:
        raise UserError(str(error)) from error
    curvature.run(names, args.data_dir, args.repeat or curvature.ROUNDS, locked_folder(args))
    return 0


def _configure_monitor(tables: Any) -> None:
    parser = add_table(
        tables, "monitor", "what SharpnessMonitor costs, on the CPU", monitor.__doc__, _monitor
    )
    names = ", ".join(monitor.TRAININGS)
    add_only(parser, f"a network, from {names}, or a pattern; may be repeated")
    add_repeat(parser, str(monitor.ROUNDS))
    add_out(parser)


def _monitor(args: argparse.Namespace) -> int:
    refuse(args, "list", "device")
    require("sklearn")
    try:
        names = monitor.select(args.only or [])
    except ValueError as error:
        raise UserError(str(error)) from error
    monitor.run(names, args.repeat or monitor.ROUNDS, locked_folder(args))
    return 0


def _configure_loop(tables: Any) -> None:
    parser = add_table(
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
    add_device(parser)
    add_repeat(parser, str(loop.ROUNDS))
    add_out(parser)


def _loop(args: argparse.Namespace) -> int:
    refuse(args, "only", "list")
    try:
        loop.run(
            args.model,
            args.batch_size,
            args.data_dir,
            device_of(args),
            args.repeat or loop.ROUNDS,
            locked_folder(args),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _configure_scale(tables: Any) -> None:
    parser = add_table(
        tables, "scale", "the memory and time of eigsh by dimension", scale.__doc__, _scale
    )
    parser.add_argument(
        "--largest",
        type=whole(scale.SIZES[0]),
        default=scale.SIZES[-1],
        metavar="N",
        help="the largest dimension; 1e8 takes 6 GB (default: %(default)s)",
    )
    add_out(parser)


def _scale(args: argparse.Namespace) -> int:
    refuse(args, "only", "repeat", "list", "device")
    scale.run(args.largest, locked_folder(args))
    return 0


def _configure_smoke(tables: Any) -> None:
    parser = add_table(
        tables, "smoke", "every kernel once, against the reference", smoke.__doc__, _smoke
    )
    add_device(parser)
    add_only(parser, f"a backend, from {', '.join(kernels.BACKENDS)}; may be repeated")
    sizes = ", ".join(map(str, smoke.SIZES))
    parser.add_argument(
        "--size",
        type=whole(1),
        action="append",
        metavar="N",
        help=f"elements of a tensor; may be repeated (default: {sizes})",
    )
    add_out(parser)


def _smoke(args: argparse.Namespace) -> int:
    refuse(args, "repeat", "list")
    device = device_of(args)
    only = args.only or []
    for name in only:
        if name not in smoke.backends(device):
            choices = ", ".join(smoke.backends(device))
            raise UserError(f"no backend {name!r} serves {device}: choose one of {choices}")
    failures = smoke.run(device, only, args.size or smoke.SIZES, locked_folder(args))
    return 1 if failures else 0


def _configure_page(tables: Any) -> None:
    parser = add_table(
        tables, "page", "a page with figures, from result files", page.__doc__, _page
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="RESULTS.json",
        help="JSON files that eigenfilter bench wrote",
    )
    add_out(parser)


def _page(args: argparse.Namespace) -> int:
    refuse(args, "only", "repeat", "list", "device")
    require("matplotlib")
    try:
        page.write(args.files, locked_folder(args))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0
