"""The library's own contenders, and SciPy's eigsh over the library's products."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.curvature.problems import HessianProblem
from benchmarks.curvature.solver import K, Solution, Solver, arpack
from eigenfilter.curvature import HessianOperator, eigsh


def solve(problem: HessianProblem, engine: str = "auto", **options: Any) -> Solution:
    """The library's `eigsh` over a new operator."""
    op = HessianOperator(problem.model, problem.loss_fn, problem.data, engine=engine)
    result = eigsh(op, K, **options)
    return Solution(result.values, result.matvecs)


def scipy(problem: HessianProblem, **options: Any) -> Solution:
    """SciPy's `eigsh` over the same products."""
    op = HessianOperator(problem.model, problem.loss_fn, problem.data, engine="cached_graph")
    return arpack(op.to_scipy(), which="LA", **options)


DEFAULTS = Solver("eigenfilter", {"defaults": solve}, joins_vectors=True)
WITHOUT_CHECK = Solver(
    "eigenfilter, without the multiplicity check",
    {"check_multiplicity=False": functools.partial(solve, check_multiplicity=False)},
    joins_vectors=True,
)
SCIPY = Solver(
    "SciPy, our product",
    {
        f"ncv=21, tol={tol:g}": functools.partial(scipy, ncv=21, tol=tol)
        for tol in (1e-2, 1e-3, 1e-4)
    },
    package="scipy",
    goal=1.0,
    goals_by_kind={"vectors": 2.0},
    joins_vectors=True,
)
