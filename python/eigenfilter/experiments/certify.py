"""Certify whether a trained model is inside the filter of its optimizer, with the evidence.

--model names a function that returns (model, loss_fn, data, optimizer), the arguments of
eigenfilter.certify. It may also return (model, loss_fn, data); flags then give the method and the
hyperparameters of the optimizer:

    eigenfilter certify --model mytraining:trained --method usam --lr 0.1 --rho 0.05

The exit code is 0 for every verdict, and 2 on bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import eigenfilter as ef
from eigenfilter import filters
from eigenfilter.experiments.cli_arguments import whole
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import output_folder, replace_text
from eigenfilter.experiments.imports import call_imported
from eigenfilter.optimizers.registry import OPTIMIZERS

HELP = "is a trained model inside its optimizer's filter?"

METHODS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    name.replace("_", "-"): OPTIMIZERS[name]
    for name, theory in filters.METHODS.items()
    if not theory.takes("momentum_norm")  # which an optimizer without steps does not have
}
_NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "rho")
_OPTIONS = (
    ("grad_norm", None, "gradient norm at which to evaluate SAM's edge (default: at the model)"),
    ("failure_probability", 1e-3, "probability that an error bar is too small"),
    ("edge_tol", 0.05, "distance that counts as at the edge, relative to the edge"),
    ("saddle_tol", 0.05, "most negative eigenvalue allowed, relative to the largest"),
    ("equilibrium_tol", 1e-3, "largest distance to an equilibrium, relative to the parameters"),
    ("tol", 0.01, "target size of error bars, relative to the largest eigenvalue"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FUNCTION",
        help="function that returns the model; see above",
    )
    parser.add_argument("--method", choices=METHODS, help="method of the optimizer (default: sgd)")
    for name in _NUMBERS:
        text = f"{name} of the optimizer"
        parser.add_argument(_flag(name), type=float, metavar="X", help=text)
    parser.add_argument(
        "--nesterov", action="store_true", default=None, help="the optimizer uses Nesterov momentum"
    )
    for name, default, text in _OPTIONS:
        help_text = text if default is None else f"{text} (default: %(default)s)"
        parser.add_argument(_flag(name), type=float, default=default, metavar="X", help=help_text)
    parser.add_argument(
        "--max-matvecs",
        type=whole(1),
        default=300,
        metavar="N",
        help="largest number of Hessian-vector products (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole(0), metavar="N", help="seed of the start vector (default: random)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the certificate as JSON"
    )


def run(args: argparse.Namespace) -> int:
    """Print the certificate; return the exit code."""
    if args.json is not None:
        output_folder(args.json.parent)
    parts = call_imported(args.model)
    if not (isinstance(parts, tuple | list) and len(parts) in (3, 4)):
        raise UserError(
            f"{args.model} must return (model, loss_fn, data) or (model, loss_fn, data, optimizer)"
        )
    model, loss_fn, data, *rest = parts
    options = {name: getattr(args, name) for name, _, _ in _OPTIONS}
    try:
        optimizer = _optimizer(args, model, rest)
        certificate = ef.certify(
            model,
            loss_fn,
            data,
            optimizer,
            max_matvecs=args.max_matvecs,
            seed=args.seed,
            **options,
        )
    except (TypeError, ValueError, FloatingPointError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    print(certificate)
    if args.json is not None:
        replace_text(args.json, certificate.to_json() + "\n")
        print(f"\nwrote {args.json}")
    return 0


def _optimizer(args: argparse.Namespace, model: Any, returned: list[Any]) -> Any:
    """Return the optimizer of the user's function, or build one from the flags."""
    names = (*_NUMBERS, "nesterov", "method")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if returned:
        if flags:
            flag = _flag(next(iter(flags)))
            raise UserError(f"{args.model} returns an optimizer; leave {flag} out")
        return returned[0]
    if "lr" not in flags:
        raise UserError(f"{args.model} returns no optimizer; give --lr, and --method")
    method = flags.pop("method", "sgd")
    if "rho" in flags and method.replace("-", "_") not in filters.ASCENTS:
        raise UserError("--rho needs a --method that ascends, such as usam")
    return METHODS[method](model.parameters(), **flags)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
