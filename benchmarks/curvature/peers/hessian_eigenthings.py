"""Lanczos with a fixed number of steps, from the package hessian-eigenthings."""

from __future__ import annotations

import functools

from benchmarks.curvature.problems import HessianProblem
from benchmarks.curvature.solver import K, Solution, Solver

STEPS = range(20, 64, 4)


def solve(problem: HessianProblem, steps: int | None = None) -> Solution:
    """Run `lanczos` over a new operator, with full reorthogonalization."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    op = HessianOperator(problem.model, problem.batches, supervised_loss(problem.loss_fn))
    result = lanczos(op, k=K, max_iter=steps, which="LA", seed=0, reorthogonalize=True)
    return Solution(result.eigenvalues, result.iterations)


SOLVERS = (
    Solver("hessian-eigenthings", {"defaults": solve}, "hessian_eigenthings"),
    Solver(
        "hessian-eigenthings, hand-picked",
        {f"max_iter={steps}": functools.partial(solve, steps=steps) for steps in STEPS},
        "hessian_eigenthings",
        1.3,
    ),
)
