"""A strict saddle that traps USAM and that two-step and Hessian USAM leave.

    f(x, y) = x^2 / 2 - b y^2 / 2 + y^4 / 4

has a saddle at 0, where the Hessian has the eigenvalues 1 and -b, and minima at (0, +-sqrt(b)). If
b > 1 / rho, the filter of USAM admits -b, and the filters of the other methods do not. All methods
start from the same points, the nearest at a distance of 0.001 in y.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eigenfilter as ef
from eigenfilter import filters
from eigenfilter.experiments.cli_arguments import add_out
from eigenfilter.experiments.errors import require
from eigenfilter.experiments.files import output_folder
from eigenfilter.experiments.plots import paths_figure
from eigenfilter.experiments.reporting import align_columns, save_results
from eigenfilter.filters import PolynomialFilter

HELP = "USAM is trapped at a strict saddle that others leave"
B = 1.5
LR, RHO = 0.03, 1.0
STEPS = 1500
STARTS = (-0.69, -0.3, -0.05, -0.001, 0.001, 0.05, 0.3, 0.69)  # starting values of y; x is 1
NEAR = 1e-3  # distance within which a path has ended at a point

METHODS: dict[str, Callable[[list[Tensor]], Any]] = {
    "gradient descent": lambda p: ef.SGD(p, lr=LR),
    "USAM": lambda p: ef.USAM(p, lr=LR, rho=RHO),
    "two-step USAM": lambda p: ef.TwoStepUSAM(p, lr=LR, rho=RHO),
    "two-step USAM, anchored": lambda p: ef.TwoStepUSAM(p, lr=LR, rho=RHO, ascent="anchored"),
    "Hessian USAM": lambda p: ef.HessianUSAM(p, lr=LR, rho=RHO, hvp="autograd"),
}


@dataclass(frozen=True)
class SaddleEscape:
    """The paths of one method near the saddle.

    Attributes:
        method: name of the method.
        admitted: whether its filter admits -b.
        predicted: factor 1 - lr p(-b) by which a step at the saddle multiplies y.
        measured: the same factor, measured in the first step from y = 1e-6.
        paths: y at every step [steps + 1, starts].
        ends: kind of the point where each path ends.
        slope: largest |df/dy| at an end.
    """

    method: str
    admitted: bool
    predicted: float
    measured: float
    paths: Tensor
    ends: list[str]
    slope: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_out(parser, "out/phenomena/saddle", "saddle.png and results.json")


def run(args: argparse.Namespace) -> int:
    """Compute the paths of all methods; return the exit code."""
    require("matplotlib")
    folder: Path = output_folder(args.out)
    escapes = [escape(name) for name in METHODS]
    print(align_columns([_HEAD, *map(_row, escapes)]))
    levels = {"minima": (-(B**0.5), B**0.5), "saddle": (0.0,)}
    paths_figure({each.method: each.paths.T.tolist() for each in escapes}, levels, folder / FIGURE)
    values = {"b": B, "lr": LR, "rho": RHO, "steps": STEPS, "starts": STARTS}
    methods = [
        {
            "method": each.method,
            "admitted": each.admitted,
            "predicted_factor": each.predicted,
            "measured_factor": each.measured,
            "ends": each.ends,
            "last_y": each.paths[-1].tolist(),
            "largest_slope": each.slope,
        }
        for each in escapes
    ]
    save_results(folder / "results.json", "phenomena saddle", values | {"methods": methods})
    print(f"wrote {folder / FIGURE} and {folder / 'results.json'}")
    return 0


FIGURE = "saddle.png"


def loss(points: Tensor) -> Tensor:
    """Return the sum of f over points (x, y) [n, 2], whose gradients do not interact."""
    x, y = points.unbind(1)
    return (0.5 * x**2 - 0.5 * B * y**2 + 0.25 * y**4).sum()


def slope(y: Tensor) -> Tensor:
    """Return df/dy."""
    return y**3 - B * y


def escape(name: str) -> SaddleEscape:
    """Compute the paths of a method from all starting points."""
    [flt] = filters.of(METHODS[name]([torch.zeros(1, requires_grad=True)]))
    assert isinstance(flt, PolynomialFilter)
    paths = follow(name, STARTS, STEPS)
    near = follow(name, (1e-6,), 1)
    last = paths[-1]
    return SaddleEscape(
        method=name,
        admitted=bool(flt.admits(-B)),
        predicted=1.0 - flt.lr * float(flt.p(-B)),
        measured=float(near[1, 0] / near[0, 0]),
        paths=paths,
        ends=[_place(float(y)) for y in last],
        slope=float(slope(last).abs().max()),
    )


def follow(name: str, starts: tuple[float, ...], steps: int) -> Tensor:
    """Return y [steps + 1, starts] along the paths of a method from (1, y) for every start."""
    begin = np.stack([np.ones(len(starts)), np.array(starts)], axis=1)
    points = torch.tensor(begin, requires_grad=True)
    optimizer = METHODS[name]([points])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(points)
        if optimizer.needs_graph:
            [points.grad] = torch.autograd.grad(value, points, create_graph=True)
        else:
            value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    path = [points.detach()[:, 1].clone()]
    for _ in range(steps):
        optimizer.step(closure)
        path.append(points.detach()[:, 1].clone())
    return torch.stack(path)


def _place(y: float) -> str:
    if abs(y) < NEAR:
        return "saddle"
    if abs(abs(y) - B**0.5) < NEAR:
        return "minimum"
    return "no critical point" if abs(float(slope(torch.tensor(y)))) > NEAR else "on its way"


_HEAD = ("method", "admits -b", "predicted", "measured", "slope at ends", "outcome")


def _row(each: SaddleEscape) -> tuple[str, ...]:
    counts = {place: each.ends.count(place) for place in dict.fromkeys(each.ends)}
    return (
        each.method,
        "yes" if each.admitted else "no",
        f"{each.predicted:.6f}",
        f"{each.measured:.6f}",
        f"{each.slope:.1e}",
        ", ".join(f"{place}: {count}" for place, count in counts.items()),
    )
