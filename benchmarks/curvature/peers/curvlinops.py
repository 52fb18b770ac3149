"""ARPACK over the operators of the package curvlinops-for-pytorch (imported as curvlinops)."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np

from benchmarks.curvature.problems import HessianProblem
from benchmarks.curvature.solver import Solution, Solver, arpack


def solve(problem: HessianProblem, dtype: Any = None, **options: Any) -> Solution:
    """Run SciPy's `eigsh` over a new operator.

    Args:
        problem: the problem.
        dtype: dtype of the vectors; None for the operator's default, float64.
        options: options of SciPy's `eigsh`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
        from curvlinops import HessianLinearOperator

        data = problem.batches if isinstance(problem.data, tuple) else problem.data
        op = HessianLinearOperator(problem.model, problem.loss_fn, problem.params, data)
        return arpack(op.to_scipy(dtype), which="LA", **options)


SOLVERS = (
    Solver("curvlinops, ARPACK", {"defaults": solve}, "curvlinops", 3.0),
    Solver(
        "curvlinops, tuned ARPACK",
        {"float32, tol=1e-2": functools.partial(solve, dtype=np.float32, tol=1e-2)},
        "curvlinops",
    ),
)
