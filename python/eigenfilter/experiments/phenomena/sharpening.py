"""Progressive sharpening: with six methods the sharpness rises to the same edge and stays there.

`filters.design` chooses the lr of each method so that all filters end at the same eigenvalue. The
largest Hessian eigenvalue rises during training until it meets this edge.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import eigenfilter as ef
from eigenfilter.experiments.full_batch import MethodSpec
from eigenfilter.experiments.phenomena.common import configure as configure_training
from eigenfilter.experiments.phenomena.common import parse_setting, report, train
from eigenfilter.filters import design

HELP = "the sharpness rises to the edge, for every method"
TITLE = "Six methods, one edge"
_BEND = 0.3  # contribution of the ascent to p(lambda) / lambda at the edge


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    configure_training(parser, "sharpening", steps=1500)


def run(args: argparse.Namespace) -> int:
    """Train every method; return the exit code."""
    setting = parse_setting(args)
    specs = methods(setting.edge)
    runs = [train(setting, method, share=1.0 / (len(specs) - i)) for i, method in enumerate(specs)]
    report(setting, "sharpening", TITLE, runs, {})
    return 0


def methods(edge: float) -> list[MethodSpec]:
    """Return the methods, with filters that end at `edge`."""
    return [
        _method("gradient descent", ef.SGD, "sgd", edge),
        _method("heavy ball", ef.SGD, "sgd", edge, momentum=0.5),
        _method("Nesterov", ef.SGD, "sgd", edge, momentum=0.7, nesterov=True),
        _method("USAM", ef.USAM, "usam", edge, rho=_BEND / edge),
        _method("two-step USAM", ef.TwoStepUSAM, "two_step_usam", edge, rho=0.5 * _BEND / edge),
        _method("Hessian USAM", ef.HessianUSAM, "hessian_usam", edge, rho=_BEND / edge**2),
    ]


def _method(
    name: str, build: Callable[..., Any], method: str, edge: float, **options: Any
) -> MethodSpec:
    lr = design(method, edge, **options)
    texts = {"lr": f"{lr:.3g}"} | {
        key: f"{value:.3g}" for key, value in options.items() if key != "nesterov"
    }
    settings = ", ".join(f"{key} {value}" for key, value in texts.items())
    return MethodSpec(name, settings, lambda params: build(params, lr=lr, **options))
