"""Power iteration with deflation, from the package PyHessian."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch

from benchmarks.curvature.problems import HessianProblem
from benchmarks.curvature.solver import K, Solution, Solver, count_calls

TIGHTER = (1e-5, 1e-6, 1e-7)


def solve(problem: HessianProblem, **options: Any) -> Solution:
    """Run `eigenvalues` of a new `hessian`, which caches the graph of a single batch."""
    module = importlib.import_module("pyhessian.hessian")
    single = isinstance(problem.data, tuple)
    data = {"data" if single else "dataloader": problem.data}
    owner, name = (
        (module, "hessian_vector_product") if single else (module.hessian, "dataloader_hv_product")
    )
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        count_calls(owner, name) as products,
    ):
        torch.manual_seed(0)
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        hessian = module.hessian(problem.model, problem.loss_fn, **data, cuda=False)
        values, _ = hessian.eigenvalues(top_n=K, **options)
    problem.model.zero_grad()
    return Solution(torch.tensor(values), products[0])


SOLVERS = (
    Solver("PyHessian", {"defaults": solve}, "pyhessian"),
    Solver(
        "PyHessian, tightened",
        {
            f"maxIter=2000, tol={tol:g}": functools.partial(solve, maxIter=2000, tol=tol)
            for tol in TIGHTER
        },
        "pyhessian",
        5.0,
        {"loader": 10.0},
    ),
)
