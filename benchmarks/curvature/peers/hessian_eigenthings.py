"""Lanczos with a given number of steps, of the package hessian-eigenthings."""

from __future__ import annotations

import functools

from benchmarks.curvature.problems import Problem
from benchmarks.curvature.solver import Found, K, Solver

STEPS = range(20, 64, 4)


def solve(problem: Problem, steps: int | None = None) -> Found:
    """`lanczos` over a new operator, orthogonal against all earlier vectors."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    op = HessianOperator(problem.model, problem.batches, supervised_loss(problem.loss_fn))
    found = lanczos(op, k=K, max_iter=steps, which="LA", seed=0, reorthogonalize=True)
    return Found(found.eigenvalues, found.iterations)


SOLVERS = (
    Solver("hessian-eigenthings", {"defaults": solve}, "hessian_eigenthings"),
    Solver(
        "hessian-eigenthings, hand-picked",
        {f"max_iter={steps}": functools.partial(solve, steps=steps) for steps in STEPS},
        "hessian_eigenthings",
        1.3,
    ),
)
