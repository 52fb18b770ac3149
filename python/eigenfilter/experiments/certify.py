"""Say whether a trained model is inside the filter of its optimizer, and on what evidence.

--model names a function that returns (model, loss_fn, data, optimizer), as eigenfilter.certify has
them, or (model, loss_fn, data), with the method and hyperparameters of the optimizer given here:

    eigenfilter certify --model mytraining:trained --method usam --lr 0.1 --rho 0.05

Exit code 0 whatever the verdict, 2 on bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import eigenfilter as ef
from eigenfilter.experiments.cli_arguments import whole
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import output_folder, replace_text
from eigenfilter.experiments.imports import call_imported

HELP = "is a trained model inside its optimizer's filter?"

METHODS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": ef.SGD,
    "usam": ef.USAM,
    "sam": ef.SAM,
    "two-step-usam": ef.TwoStepUSAM,
    "hessian-usam": ef.HessianUSAM,
}
_NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "rho")
_OPTIONS = (
    ("grad_norm", None, "of the gradient, at which SAM's edge is wanted (default: at the model)"),
    ("failure_probability", 1e-3, "of an error bar that is too small"),
    ("edge_tol", 0.05, "how near counts as at the edge, relative to it"),
    ("saddle_tol", 0.05, "how negative an eigenvalue may be, relative to the largest"),
    ("equilibrium_tol", 1e-3, "how far an equilibrium may be, relative to the parameters"),
    ("tol", 0.01, "how small error bars get, relative to the largest eigenvalue"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FUNCTION",
        help="what returns the model; see above",
    )
    parser.add_argument("--method", choices=METHODS, help="of the optimizer (default: sgd)")
    for name in _NUMBERS:
        parser.add_argument(_flag(name), type=float, metavar="X", help="of the optimizer")
    parser.add_argument("--nesterov", action="store_true", default=None, help="of the optimizer")
    for name, default, text in _OPTIONS:
        shown = text if default is None else f"{text} (default: %(default)s)"
        parser.add_argument(_flag(name), type=float, default=default, metavar="X", help=shown)
    parser.add_argument(
        "--max-matvecs",
        type=whole(1),
        default=300,
        metavar="N",
        help="most products with a vector (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole(0), metavar="N", help="of the random start (default: drawn)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it as JSON too")


def run(args: argparse.Namespace) -> int:
    """Print the certificate; return the exit code."""
    if args.json is not None:
        output_folder(args.json.parent)
    made = call_imported(args.model)
    if not (isinstance(made, tuple | list) and len(made) in (3, 4)):
        raise UserError(
            f"{args.model} must return (model, loss_fn, data) or (model, loss_fn, data, optimizer)"
        )
    model, loss_fn, data, *rest = made
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


def _optimizer(args: argparse.Namespace, model: Any, made: list[Any]) -> Any:
    """The optimizer that was returned, or one of the method and hyperparameters given."""
    names = (*_NUMBERS, "nesterov", "method")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if made:
        if given:
            flag = _flag(next(iter(given)))
            raise UserError(f"{flag} does not go with an optimizer, which {args.model} returns")
        return made[0]
    if "lr" not in given:
        raise UserError(f"give --lr, and --method: {args.model} returns no optimizer")
    method = given.pop("method", "sgd")
    if method == "sgd" and "rho" in given:
        raise UserError("--rho needs a --method that ascends")
    return METHODS[method](model.parameters(), **given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
