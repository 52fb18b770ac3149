"""Following the largest eigenvalue of a model while it trains, each time from the last result."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.curvature.problems import Problem, Recipe, step
from eigenfilter.curvature import EigenResult, HessianOperator, eigsh

TRACKED = "mlp-mnist"  # the problem whose model is followed
CHECKS, STEPS, LR = 12, 5, 0.01
TOL = 1e-3
MOST_PRODUCTS = 3

WAYS: Mapping[str, tuple[bool, dict[str, Any]]] = {
    "cold": (False, {"check_multiplicity": False}),
    "warm": (True, {"check_multiplicity": False}),
    "warm, defaults": (True, {}),
}
"""Whether a check starts from the one before, and the options of `eigsh`."""


@dataclass(frozen=True)
class Track:
    """Figures of the checks after the first.

    Attributes:
        way: of WAYS.
        products: a check, the median and the most.
        error: the worst relative error against float64.
        moved: the median relative change of the eigenvalue from check to check.
    """

    way: str
    products: float
    most: int
    error: float
    moved: float


def measure(recipe: Recipe, folder: Path) -> list[Track]:
    """Follow a problem's model through CHECKS checks, STEPS steps of training apart.

    Raises:
        Missing: its data are not in the folder.
    """
    start = recipe.build(folder)
    return [_follow(copy.deepcopy(start), way) for way in WAYS]


def _follow(problem: Problem, way: str) -> Track:
    warm, options = WAYS[way]
    op = HessianOperator(problem.model, problem.loss_fn, problem.data)
    opt = torch.optim.SGD(problem.params, lr=LR)
    last: EigenResult | None = None
    products, values, errors = [], [], []
    for _ in range(CHECKS):
        last = eigsh(op, 1, tol=TOL, v0=last if warm else None, **options)
        double = problem.double()
        exact = eigsh(HessianOperator(double.model, double.loss_fn, double.data), 1, tol=1e-8)
        products.append(last.matvecs)
        values.append(float(exact.values[0]))
        errors.append(abs(float(last.values[0]) / values[-1] - 1))
        for _ in range(STEPS):
            step(opt, problem)
        opt.zero_grad()
    moved = np.abs(np.diff(values)) / np.abs(values[:-1])
    return Track(
        way,
        float(np.median(products[1:])),
        max(products[1:]),
        max(errors[1:]),
        float(np.median(moved)),
    )
