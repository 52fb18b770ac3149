"""Measure the spectrum of a trained model's Hessian.

CHECKPOINT is a checkpoint of `eigenfilter train`, or the folder of its run. With --model and
--data, which are import paths (package.module:name), it is a state_dict of that model, and is
optional. The command prints the largest eigenvalues with their residuals, the edge of the
optimizer's filter, and the certificate of `eigenfilter certify`. It writes spectrum.json and
spectrum.png, which also contain the density of all eigenvalues.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eigenfilter as ef
from eigenfilter import filters
from eigenfilter.certificate import Certificate
from eigenfilter.curvature import CurvatureOperator, EigenResult, SpectralDensity
from eigenfilter.experiments.cli_arguments import add_data_dir, add_device, add_out, positive, whole
from eigenfilter.experiments.devices import device_of
from eigenfilter.experiments.errors import UserError, require
from eigenfilter.experiments.files import replace, replace_text
from eigenfilter.experiments.loaded_models import LoadedModel, load_imported, load_trained
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.logs import json_safe

HELP = "eigenvalues and density of a trained model's Hessian"
MATRICES: Mapping[str, Callable[..., CurvatureOperator]] = {
    "hessian": ef.curvature.HessianOperator,
    "ggn": ef.curvature.GGNOperator,
    "fisher": ef.curvature.EmpiricalFisherOperator,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="checkpoint; see above"
    )
    own = parser.add_argument_group("a model of your own", "import paths, package.module:name")
    own.add_argument("--model", metavar="PATH", help="a torch.nn.Module, or a function for one")
    own.add_argument(
        "--data", metavar="PATH", help="a batch, a list of batches, a DataLoader, or a function"
    )
    own.add_argument(
        "--loss", metavar="PATH", help="function (output, target) -> mean (default: cross entropy)"
    )
    own.add_argument(
        "--optimizer", metavar="PATH", help="function parameters -> optimizer, to show its edge"
    )
    ours = parser.add_argument_group("a checkpoint of eigenfilter train")
    add_data_dir(ours)
    for name, default, text in (
        ("samples", 2000, "number of the first training images to use; 0 uses all"),
        ("batch-size", 500, "images per batch"),
    ):
        ours.add_argument(
            f"--{name}",
            type=whole(int(name == "batch-size")),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    _add_measurement(parser)
    add_device(parser)
    add_out(parser, "out/spectrum", "spectrum.json and spectrum.png")


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    """Add what is computed of which matrix, and how precisely."""
    parser.add_argument(
        "--matrix",
        choices=tuple(MATRICES),
        default="hessian",
        help="curvature matrix (default: %(default)s)",
    )
    parser.add_argument(
        "--mode",
        choices=("eval", "train"),
        default="eval",
        help="mode of batch normalization and dropout (default: %(default)s)",
    )
    parser.add_argument(
        "--which",
        choices=("LA", "SA", "LM", "BE"),
        default="LA",
        help="largest, smallest, largest in magnitude, or both ends (default: %(default)s)",
    )
    for name, low, default, text in (
        ("pairs", 1, 10, "number of eigenpairs"),
        ("probes", 0, 4, "random vectors for the density; 0 skips the density"),
        ("steps", 1, 60, "Lanczos steps per random vector"),
        ("certificate", 0, 300, "largest number of products for the certificate; 0 skips it"),
        ("seed", 0, 0, "seed of the random vectors; the certificate draws its own"),
    ):
        parser.add_argument(
            f"--{name}",
            type=whole(low),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    parser.add_argument(
        "--tol",
        type=positive,
        default=1e-3,
        metavar="X",
        help="relative tolerance of the eigenvalues (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure the spectrum, print and write it; return the exit code."""
    require("matplotlib", "tqdm")
    with folder_lock(args.out, "spectrum") as folder:
        return _run(args, folder)


def _run(args: argparse.Namespace, folder: Path) -> int:
    loaded = _load_model(args)
    edge = edge_of(loaded.optimizer)
    try:
        pairs, density = measure(loaded, args)
        certificate = certificate_of(loaded, args)
    except (ValueError, FloatingPointError, TypeError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    except KeyboardInterrupt:
        raise UserError("interrupted: nothing was written") from None
    print(table(pairs, edge, density))
    if certificate is not None:
        print(f"\n{certificate}")
    results = {
        "command": "spectrum",
        "subject": loaded.source,
        "matrix": args.matrix,
        "mode": args.mode,
        "which": args.which,
        "edge": edge,
        "certificate": certificate.to_dict() if isinstance(certificate, Certificate) else None,
        "parameters": pairs.vectors.shape[0],
        "versions": {"eigenfilter": ef.__version__, "torch": str(torch.__version__)},
    } | as_json(pairs, density)
    replace_text(folder / "spectrum.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    figure(pairs, density, edge, folder / "spectrum.png")
    print(f"wrote {folder / 'spectrum.json'} and {folder / 'spectrum.png'}")
    return 0


def _load_model(args: argparse.Namespace) -> LoadedModel:
    device = device_of(args.device)
    if args.model is None:
        for name in ("data", "loss", "optimizer"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} needs --model")
        if args.checkpoint is None:
            raise UserError("give a CHECKPOINT of eigenfilter train, or --model and --data")
        return load_trained(
            args.checkpoint,
            device,
            data_dir=args.data_dir,
            samples=args.samples,
            batch_size=args.batch_size,
        )
    if args.data is None:
        raise UserError("--model needs --data; give the import path of its batches")
    return load_imported(
        args.model,
        args.data,
        device,
        loss=args.loss,
        optimizer=args.optimizer,
        weights=args.checkpoint,
    )


def measure(
    loaded: LoadedModel, args: argparse.Namespace
) -> tuple[EigenResult, SpectralDensity | None]:
    """Return the eigenpairs and, on request, the density of the other eigenvalues."""
    op = MATRICES[args.matrix](
        loaded.model, loaded.loss_fn, loaded.data, mode=args.mode, seed=args.seed
    )
    with _count_products(op) as counted_op, warnings.catch_warnings():
        # The table shows why the iteration stopped, so the warnings are not needed.
        warnings.filterwarnings("ignore", r"stopped after|\d+ pairs converged", RuntimeWarning)
        pairs = ef.curvature.eigsh(
            counted_op, args.pairs, which=args.which, tol=args.tol, seed=args.seed
        )
        if not args.probes:
            return pairs, None
        density = ef.curvature.spectral_density(
            counted_op, args.probes, args.steps, deflate=pairs, seed=args.seed
        )
    return pairs, density


def certificate_of(loaded: LoadedModel, args: argparse.Namespace) -> Certificate | str | None:
    """Return the certificate or the reason why there is none.

    The result is None if no certificate was requested or the optimizer is not known.
    """
    if loaded.optimizer is None or args.matrix != "hessian" or not args.certificate:
        return None
    try:
        return ef.certify(
            loaded.model,
            loaded.loss_fn,
            loaded.data,
            loaded.optimizer,
            max_matvecs=args.certificate,
            mode=args.mode,
        )
    except (TypeError, ValueError) as error:
        return f"no certificate: {error}"


def edge_of(optimizer: torch.optim.Optimizer | None) -> float | None:
    """Return the largest eigenvalue that the optimizer's filter admits, or None without a bound.

    At lr 0, where a schedule may have ended, every eigenvalue is admitted. The edge of AdamW
    belongs to the preconditioned Hessian, and the edge of SAM depends on the gradient norm.
    """
    if optimizer is None:
        return None
    try:
        first, *others = filters.of(optimizer)
    except TypeError:
        return None
    if isinstance(first, filters.AdamW) or any(flt != first for flt in others):
        return None
    edge = first.max_eigenvalue()
    return edge if math.isfinite(edge) else None


def table(pairs: EigenResult, edge: float | None, density: SpectralDensity | None) -> str:
    """Return the results as text.

    The residual ||H v - lambda v|| bounds the distance to an eigenvalue of the matrix H.
    """
    lines = [f"{'eigenvalue':>12}  {'residual':>9}  {'error':>9}"]
    for value, residual, error, converged in zip(
        pairs.values, pairs.residuals, pairs.errors, pairs.converged, strict=True
    ):
        note = "" if converged else "  not converged"
        lines.append(f"{float(value):>12.6g}  {float(residual):>9.1e}  {float(error):>9.1e}{note}")
    lines.append(f"{pairs.matvecs} products: {pairs.reason}")
    if density is not None:
        trace = density.trace
        lines.append(f"trace {trace.value:.5g} +- {trace.standard_error:.2g}")
    if edge is not None:
        ratio = float(pairs.values.max()) / edge
        lines.append(f"edge of the optimizer's filter {edge:.5g}; the largest is {ratio:.3f} of it")
    return "\n".join(lines)


def as_json(pairs: EigenResult, density: SpectralDensity | None) -> dict[str, Any]:
    """Return the results as plain data."""
    results: dict[str, Any] = {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "errors": pairs.errors.tolist(),
        "converged": pairs.converged.tolist(),
        "matvecs": pairs.matvecs,
        "reason": pairs.reason,
    }
    if density is not None:
        trace = density.trace
        error = float(trace.standard_error)
        results["trace"] = json_safe({"value": float(trace.value), "standard_error": error})
        results["density"] = {
            "nodes": density.nodes.tolist(),
            "weights": density.weights.tolist(),
            "deflated": density.deflated.tolist(),
            "matvecs": density.matvecs,
        }
    return results


def figure(
    pairs: EigenResult, density: SpectralDensity | None, edge: float | None, path: Path
) -> None:
    """Write a PNG with the density, a tick for every eigenpair, and the edge as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from eigenfilter.experiments.plots import COLORS

    fig = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.add_subplot()
    if density is not None:
        density.plot(axes)
    values = [float(value) for value in pairs.values]
    axes.plot(
        values,
        [0.03] * len(values),
        "|",
        color=COLORS[1],
        markersize=14,
        transform=axes.get_xaxis_transform(),
        label="eigenpairs",
    )
    if edge is not None:
        axes.axvline(edge, color="0.4", linestyle=(0, (5, 3)), linewidth=1.2, label="edge")
    axes.set(xlabel="eigenvalue", title=f"{pairs.vectors.shape[0]:,} parameters")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    replace(path, lambda file: fig.savefig(file, format="png", dpi=160))


class _CountedOperator:
    """A curvature operator that counts its products in a progress bar."""

    def __init__(self, op: CurvatureOperator, bar: Any) -> None:
        self._op, self._bar = op, bar
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device

    def matvec(self, v: Tensor) -> Tensor:
        result = self._op.matvec(v)
        self._bar.update()
        return result

    def matmat(self, V: Tensor) -> Tensor:
        result = self._op.matmat(V)
        self._bar.update(V.shape[1])
        return result

    def fixed(self) -> AbstractContextManager[None]:
        return self._op.fixed()


@contextmanager
def _count_products(op: CurvatureOperator) -> Iterator[_CountedOperator]:
    from tqdm import tqdm

    with tqdm(desc="Hessian products", unit="", leave=False, disable=None) as bar:
        yield _CountedOperator(op, bar)
