"""Tracking of the largest eigenvalue of a model while it trains, from the previous eigenvector."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.curvature.problems import HessianProblem, ProblemRecipe, train_step
from eigenfilter.curvature import EigenResult, HessianOperator, eigsh

PROBLEM = "mlp-mnist"
CHECKS = 12
STEPS = 5  # steps of training between checks
LR = 0.01
TOL = 1e-3
MAX_PRODUCTS = 3  # the goal for the median check with a warm start

WAYS: Mapping[str, tuple[bool, dict[str, Any]]] = {
    "cold": (False, {"check_multiplicity": False}),
    "warm": (True, {"check_multiplicity": False}),
    "warm, defaults": (True, {}),
}
"""By name: whether a check starts from the previous one's vector, and the options of `eigsh`."""


@dataclass(frozen=True)
class TrackingResult:
    """The checks after the first one.

    Attributes:
        way: a name from WAYS.
        products: Hessian-vector products of a check, the median.
        most: the most products of a check.
        error: the worst relative error against float64.
        moved: the median relative change of the eigenvalue from check to check.
    """

    way: str
    products: float
    most: int
    error: float
    moved: float


def measure(recipe: ProblemRecipe, folder: Path) -> list[TrackingResult]:
    """Track a problem's model in CHECKS checks, with STEPS steps of training between them.

    Raises:
        MissingRequirement: its data are not in the folder.
    """
    start = recipe.build(folder)
    return [_track(copy.deepcopy(start), way) for way in WAYS]


def _track(problem: HessianProblem, way: str) -> TrackingResult:
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
            train_step(opt, problem)
        opt.zero_grad()
    changes = np.abs(np.diff(values)) / np.abs(values[:-1])
    return TrackingResult(
        way,
        float(np.median(products[1:])),
        max(products[1:]),
        max(errors[1:]),
        float(np.median(changes)),
    )
