"""Train an image classifier with any of the optimizers.

A YAML file, flags, or both configure the run; flags override the file. The checkpoint, config.yaml,
log.jsonl and results.json are written into --out. Ctrl-C saves a checkpoint and stops; --resume
continues from it to the same bits. To train one network on many GPUs, which share each batch:

    torchrun --nproc-per-node 8 -m eigenfilter train ...
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eigenfilter.experiments import config as configs
from eigenfilter.experiments.cli_arguments import add_data_dir, add_device, positive
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError, require
from eigenfilter.experiments.interrupts import STOPPED, graceful_stop
from eigenfilter.experiments.processes import init_distributed

HELP = "train a network on digits, MNIST, Fashion-MNIST or CIFAR"
OUT = Path("out/train")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="CONFIG.yaml",
        help="file with one option per line, as in 'lr: 0.1'",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint in --out, with its configuration",
    )
    add_data_dir(parser)
    add_device(parser)
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="MINUTES",
        help="time limit, after which the run stops as at Ctrl-C",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write the log as TensorBoard events"
    )
    configs.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code."""
    require("yaml", "tqdm", *(["tensorboard"] if args.tensorboard else []))
    from eigenfilter.experiments import runs

    with (
        init_distributed() as processes,
        graceful_stop(args.budget) as stop,
        _TrainDisplay() as display,
    ):
        results = runs.run(
            processes.run_on_main(lambda: _config(args)),
            args.out,
            data_dir=args.data_dir,
            device=args.device,
            resume=args.resume,
            tensorboard=args.tensorboard,
            stop=stop,
            observe=display.observe,
            processes=processes,
        )
    stopped = results["outcome"] == "stopped"
    if processes.is_main:
        print(summary(results))
        if stopped:
            command = f"{processes.launch_command} train --resume --out {args.out}"
            print(f"stopped at step {results['step']}; to continue: {command}")
        else:
            print(f"wrote {args.out / 'checkpoint.pt'}, log.jsonl and results.json")
    return STOPPED if stopped and stop.signalled else 0


def _config(args: argparse.Namespace) -> Config:
    """Return the configuration: flags over the file over the checkpoint over the defaults."""
    from eigenfilter.experiments import checkpoint

    flags = configs.from_flags(args)
    path = args.out / checkpoint.FILE
    values: dict[Any, Any] = {}
    if args.resume and path.exists():
        values = checkpoint.read_run(path)["config"]
        try:
            Config.of(values)
        except ValueError as error:
            raise UserError(
                f"{path} has a configuration that is damaged, or of another version ({error}); "
                "restore it, or train again into another --out"
            ) from error
    try:
        if args.config is not None:
            values = values | configs.read(args.config)
        return Config.of(values | flags)
    except ValueError as error:
        raise UserError(str(error)) from error


def summary(results: dict[str, Any]) -> str:
    """Return the results of a run in one line."""
    parts = [f"{results['epochs']:g} epochs in {results['seconds']:.1f} s"]
    for kind in ("train", "test"):
        if kind in results:
            record = results[kind]
            loss = math.inf if record["loss"] is None else record["loss"]
            parts.append(f"{kind} loss {loss:.4f}, accuracy {record['accuracy']:.2%}")
    if "sharpness" in results:
        parts.append(_sharpness(results["sharpness"]))
    return "; ".join(parts)


class _TrainDisplay:
    """A progress bar, and a line for every evaluation on the test set."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def __enter__(self) -> _TrainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def observe(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Show a record of the run with the method of its kind, if there is one."""
        show: Callable[[int, dict[str, Any]], None] | None = getattr(self, f"_on_{kind}", None)
        if show is not None:
            show(step, record)

    def _on_start(self, step: int, record: dict[str, Any]) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=record["total"], initial=step, unit=" steps", leave=False, disable=None
        )

    def _on_train(self, step: int, record: dict[str, Any]) -> None:
        self._shown["images"] = f"{record['images_per_second']:,.0f} images/s"
        self._shown["loss"] = f"loss {record['loss']:.4f}"
        self._shown["accuracy"] = f"accuracy {record['accuracy']:.1%}"
        self._refresh(step)

    def _on_sharpness(self, step: int, record: dict[str, Any]) -> None:
        self._shown["sharpness"] = _sharpness(record)
        self._refresh(step)

    def _on_test(self, step: int, record: dict[str, Any]) -> None:
        parts = [
            f"epoch {record['epoch']:g}",
            *self._shown.values(),
            f"test loss {record['loss']:.4f}, accuracy {record['accuracy']:.2%}",
        ]
        self._bar.write("; ".join(parts))
        self._refresh(step)

    def _refresh(self, step: int) -> None:
        self._bar.set_postfix_str(", ".join(self._shown.values()), refresh=False)
        self._bar.update(step - self._bar.n)


def _sharpness(record: dict[str, Any]) -> str:
    edge = "" if record["edge"] is None else f" (edge {record['edge']:.4g})"
    set_by = [f", {name} {record[name]:.4g}" for name in ("extrapolation", "rho") if name in record]
    return f"sharpness {record['sharpness']:.4g}{edge}{''.join(set_by)}"
