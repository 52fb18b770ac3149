"""ARPACK over the operators of the package curvlinops-for-pytorch."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np

from benchmarks.curvature.problems import Problem
from benchmarks.curvature.solver import Found, Solver, arpack


def solve(problem: Problem, dtype: Any = None, **options: Any) -> Found:
    """SciPy's eigsh over a new operator, whose vectors are of float64 unless told otherwise."""
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
