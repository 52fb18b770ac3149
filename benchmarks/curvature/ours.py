"""The library's own contenders, and the short way to the same with SciPy."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.curvature.problems import Problem
from benchmarks.curvature.solver import Found, K, Solver, arpack
from eigenfilter.curvature import HessianOperator, eigsh


def solve(problem: Problem, engine: str = "auto", **options: Any) -> Found:
    """`eigsh` over a new operator."""
    op = HessianOperator(problem.model, problem.loss_fn, problem.data, engine=engine)
    found = eigsh(op, K, **options)
    return Found(found.values, found.matvecs)


def scipy(problem: Problem, **options: Any) -> Found:
    """SciPy's eigsh over the same products."""
    op = HessianOperator(problem.model, problem.loss_fn, problem.data, engine="cached_graph")
    return arpack(op.to_scipy(), which="LA", **options)


OURS = Solver("eigenfilter", {"defaults": solve}, vectors=True)
ALONE = Solver(
    "eigenfilter, no copies",
    {"check_multiplicity=False": functools.partial(solve, check_multiplicity=False)},
    vectors=True,
)
SCIPY = Solver(
    "SciPy, our product",
    {
        f"ncv=21, tol={tol:g}": functools.partial(scipy, ncv=21, tol=tol)
        for tol in (1e-2, 1e-3, 1e-4)
    },
    package="scipy",
    goal=1.0,
    special={"vectors": 2.0},
    vectors=True,
)
